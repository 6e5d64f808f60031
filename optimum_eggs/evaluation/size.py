"""What a model takes: parameters, and bytes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from ..hf.attach import packed_layers
from ..packing.checkpoint import read_headers, weight_files

_ELEMENT_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8, "I32": 4, "BOOL": 1}
_PARTS = ("weight", "weight_meta")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        parameters: Parameters of the dense model, tied ones counted once.
        parameters_kept: Those that are not zero by the pattern.
        weight_bytes: Bytes of the safetensors files; None for a model in memory, which has none.
        pruned_layer_bytes: Bytes of the layers that are packed (values and bits, without biases); of the layers named
            in `names` for a dense model. In the files, or in memory.
    """

    parameters: int
    parameters_kept: int
    weight_bytes: int | None
    pruned_layer_bytes: int


def model_size(model: nn.Module, folder: str | Path | None, names: list[str] | None = None) -> ModelSize:
    """Sizes of `model`, loaded from `folder` if it is not None.

    `names`: the layers to count as pruned; default, the packed ones.

    Raises:
        CheckpointError: the folder holds no whole safetensors checkpoint.
    """
    layers = packed_layers(model)
    kept = sum(parameter.numel() for parameter in model.parameters())
    dropped = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers.values())
    wanted = {f"{name}.{part}" for name in names or layers for part in _PARTS}
    if folder is None:
        packed = sum(value.nbytes for key, value in model.state_dict().items() if key in wanted)
        return ModelSize(kept + dropped, kept, None, packed)
    files = weight_files(folder)
    entries = read_headers(files)
    packed = sum(
        prod(entry.shape) * _ELEMENT_SIZE.get(entry.dtype, 1) for key, entry in entries.items() if key in wanted
    )
    return ModelSize(kept + dropped, kept, sum(file.stat().st_size for file in files), packed)
