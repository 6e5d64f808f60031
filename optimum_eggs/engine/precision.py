"""A block in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..calibration.context import text_config
from ..errors import ModelError


def check_float32(model: nn.Module, asked: str) -> None:
    """Raise unless the blocks of `model` run in float32, as what was `asked` for needs.

    Raises:
        ModelError: its attention takes half precision alone, as flash attention does.
    """
    attention = str(getattr(text_config(model), "_attn_implementation", ""))
    if "flash" in attention:
        raise ModelError(
            f"{asked} runs blocks in float32, which attn_implementation={attention!r} cannot do; load the model with "
            "attn_implementation='sdpa'"
        )


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """All floating-point parameters of `block` in float32; afterwards, what they hold is rounded back to their dtypes.

    A parameter that has not changed comes back bit for bit. Memory: a float32 copy of what is stored otherwise.
    """
    stored = [(p, p.data) for p in block.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    try:
        for parameter, data in stored:
            parameter.data = data.to(torch.float32)
        yield
    finally:
        for parameter, data in stored:
            data.copy_(parameter.data)
            parameter.data = data
