"""The functions behind transformers' `from_pretrained` that streaming calls, and transformers does not promise to keep.

Why not `from_pretrained` itself, and a block copied when it is used and let go? Peak of anonymous memory (MiB) beyond
that of a tiny model, with transformers 5.24: a Llama of 345 MiB in bfloat16 (16 blocks), a Mixtral of 305 MiB (8):

| | Llama | to float32 | Mixtral | to float32 |
|---|---:|---:|---:|---:|
| mapped: `device_map="cpu"` | 30 | 704 | 303 | 1038 |
| blocks on `"disk"`, with an `offload_folder` | 9 | 58 | 44 | 113 |
| the functions below | 30 | 119 | 88 | 225 |

Mapped weights are enough where nothing is converted. What is converted (another dtype, experts that are merged into
one tensor) is so for the whole model when it is loaded; on a GPU all of it is there. With blocks on disk, accelerate's
hooks bring one at a time. But what a conversion makes is first written to the folder: 265 MB for the Mixtral, 529 in
float32, a second copy of the model for any mixture, by every process and every run that goes on. A weight that is
missing is filled with random values and a warning; and the hooks, private too, would have to follow experts that are
split and layers that are packed. So a block is loaded by the functions that `from_pretrained` calls, on the keys of
that block alone. `tests/streaming/test_internals.py` pins their names and signatures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig


def conversions_of(model: Any) -> list[Any]:
    """What transformers does to the keys and tensors of a checkpoint when it loads `model`."""
    return get_model_conversion_mapping(model)


def name_of(key: str, model: Any, conversions: list[Any], known: dict[str, Tensor]) -> str:
    """The model's name of the weight that a key of the checkpoint goes to, the first if there are several.

    Args:
        key: As in the file.
        model: The model.
        conversions: Of [`conversions_of`].
        known: The model's state dict.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    name, _ = rename_source_key(key, renamings, converters, prefix, known)
    if name not in known and key in known:  # as transformers does
        name, _ = rename_source_key(key, [], [], prefix, known)
    return name


def one_key_fills_several(conversions: list[Any]) -> bool:
    """Whether a key of the checkpoint may fill several weights, so that its name alone does not tell which."""
    return any(isinstance(entry, WeightConverter) for entry in conversions)


def load_keys(
    model: Any, slices: dict[str, Any], conversions: list[Any], dtype: torch.dtype, device: torch.device
) -> list[Any]:
    """Load some keys of a checkpoint, key -> slice of an open file, into `model`. Returns what did not fit."""
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=conversions,
        device_map={"": device},
    )
    info, _ = convert_and_load_state_dict_in_model(model, slices, config)
    return [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]


def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers of a model that no file holds, as `from_pretrained` does."""
    for name, buffer in model.named_non_persistent_buffers():
        module, _, own = name.rpartition(".")
        empty = torch.empty_like(buffer, device=device)
        model.get_submodule(module).register_buffer(own, empty, persistent=False)
    model.initialize_weights()
