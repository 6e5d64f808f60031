"""A block in float32 for a while, and products in bfloat16 where those are fast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calls import forward_replaced
from ..calibration.context import text_config
from ..calibration.hooks import input_of
from ..errors import ModelError
from ..nn.dense import is_dense_linear
from ..ops import INSTRUCTION_SETS


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


@contextmanager
def bfloat16_products(block: nn.Module) -> Iterator[None]:
    """The linear layers of `block` multiply in bfloat16, if its device has instructions for that; else nothing changes.

    What they take and give keeps its dtype, so that nothing else in the block sees a difference. Autocast over the
    whole block would reach further, into code that does not know of it.
    """
    device = next(block.parameters()).device
    layers = [module for module in block.modules() if is_dense_linear(module)] if has_bfloat16_products(device) else []

    def faster(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return plain(*args, **kwargs).to(input_of(args, kwargs).dtype)

        return forward

    with forward_replaced([(layer, faster(layer.forward)) for layer in layers]):
        yield


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether `device` has instructions that multiply in bfloat16 and add up in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not {"avx512_bf16", "amx"}.isdisjoint(INSTRUCTION_SETS)
