"""What a model takes: parameters, and bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..hf.attach import packed_layers
from ..nn import NMLinear
from ..packing.checkpoint import read_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ELEMENT_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8, "I32": 4, "BOOL": 1}
_PARTS = ("weight", "weight_meta")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        parameters: Parameters of the dense model, tied ones counted once.
        parameters_kept: Those that are not zero by the pattern.
        weight_bytes: Bytes of the safetensors files; None for a model in memory, which has none.
        pruned_layer_bytes: Bytes of the layers that are packed (values and bits, without biases); for a dense model, of
            those that are packed in the other one. In the files, or in memory.
    """

    parameters: int
    parameters_kept: int
    weight_bytes: int | None
    pruned_layer_bytes: int


def model_size(
    model: PreTrainedModel, folder: str | Path | None, twins: Mapping[str, NMLinear] | None = None
) -> ModelSize:
    """Sizes of `model`, loaded from `folder` if it is not None.

    `twins`: packed layers of another model whose dense ones to count; default, its own packed layers. Experts, which a
    dense model holds under other names, take the bytes of their elements in the dtype of the largest tensor.

    Raises:
        CheckpointError: the folder holds no whole safetensors checkpoint.
    """
    layers = packed_layers(model)
    kept = sum(parameter.numel() for parameter in model.parameters())
    dropped = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers.values())
    if folder is None:
        weight_bytes, element = None, model.dtype.itemsize
        held = {key: value.nbytes for key, value in model.state_dict().items()}
    else:
        files = weight_files(folder)
        weight_bytes, entries = sum(file.stat().st_size for file in files), read_headers(files)
        held = {key: prod(entry.shape) * _ELEMENT_SIZE.get(entry.dtype, 1) for key, entry in entries.items()}
        largest = max(entries.values(), key=lambda entry: prod(entry.shape), default=None)
        element = model.dtype.itemsize if largest is None else _ELEMENT_SIZE.get(largest.dtype, 1)
    pruned = 0
    for name, layer in (twins or layers).items():
        parts = [held[key] for key in (f"{name}.{part}" for part in _PARTS) if key in held]
        pruned += sum(parts) if parts else layer.in_features * layer.out_features * element
    return ModelSize(kept + dropped, kept, weight_bytes, pruned)
