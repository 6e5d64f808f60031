"""What a model takes: parameters, and bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..nn import PackedLinear, packed_layers, values_kept
from ..packing.checkpoint import ELEMENT_SIZE, read_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ("weight", "weight_meta", "weight_scale")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        parameters: Parameters of the dense model, tied ones counted once.
        parameters_kept: Those that are not zero by the pattern.
        weight_bytes: Bytes of the safetensors files; None for a model in memory, which has none.
        pruned_layer_bytes: Bytes of the layers that are packed (values, scales and bits, without biases); for a dense
            model, of those that are packed in the other one. In the files, or in memory.
    """

    parameters: int
    parameters_kept: int
    weight_bytes: int | None
    pruned_layer_bytes: int


def model_size(
    model: PreTrainedModel, folder: str | Path | None, twins: Mapping[str, PackedLinear] | None = None
) -> ModelSize:
    """Sizes of `model`, loaded from `folder` if it is not None.

    `twins`: packed layers of another model whose dense ones to count; default, its own packed layers. Experts, which a
    dense model holds under other names, take the bytes of their elements in the dtype of the largest tensor.

    Raises:
        CheckpointError: the folder holds no whole safetensors checkpoint.
    """
    layers = packed_layers(model)
    of_layers = sum(values_kept(layer) for layer in layers.values())
    kept = sum(parameter.numel() for parameter in model.parameters())
    kept += of_layers - sum(layer.weight.numel() for layer in layers.values())  # two codes of four bits are one byte
    dropped = sum(layer.in_features * layer.out_features for layer in layers.values()) - of_layers
    if folder is None:
        weight_bytes, element = None, model.dtype.itemsize
        held = {key: value.nbytes for key, value in model.state_dict().items()}
    else:
        files = weight_files(folder)
        weight_bytes, entries = sum(file.stat().st_size for file in files), read_headers(files)
        held = {key: entry.nbytes for key, entry in entries.items()}
        largest = max(entries.values(), key=lambda entry: prod(entry.shape), default=None)
        element = model.dtype.itemsize if largest is None else ELEMENT_SIZE.get(largest.dtype, 1)
    pruned = 0
    for name, layer in (twins or layers).items():
        parts = [held[key] for key in (f"{name}.{part}" for part in _PARTS) if key in held]
        pruned += sum(parts) if parts else layer.in_features * layer.out_features * element
    return ModelSize(kept + dropped, kept, weight_bytes, pruned)
