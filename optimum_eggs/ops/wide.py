"""Products of 16 bits made in float32, where that is faster: on processors with AVX2 alone.

torch casts 16 bits there one number at a time, in every product; cast once, they are multiplied many times as fast.
What comes out is rounded once, as by the kernels of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .native import INSTRUCTION_SETS

_NUMBERS = 1 << 22  # of a weight in float32 at a time
_INSTRUCTION_SETS = ("avx2",)  # measured with benchmarks/layers.py; others multiply 16 bits, or were not at hand


def widens(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of many tokens in `dtype` are faster in float32."""
    halves = dtype in (torch.bfloat16, torch.float16)
    return halves and device_type == "cpu" and INSTRUCTION_SETS[-1:] == _INSTRUCTION_SETS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b of tensors of one dtype, x (..., in) and weight (out, in), in float32, and rounded to that dtype."""
    return by_parts(x, weight, bias, lambda flat, values, own, rows: torch.nn.functional.linear(flat, values, own))


def by_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor, Tensor | None, slice], Tensor],
) -> Tensor:
    """Y (..., out) in the dtype of x, some rows of what is stored at a time.

    Args:
        x: (..., in).
        weight: (out, width).
        bias: (out,) or None.
        multiply: Gives Y (tokens, rows) of x (tokens, in), and rows of the weight and of the bias, all float32; and
            which rows they are.
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    y = x.new_empty((len(flat), len(weight)))
    height = max(64, _NUMBERS // max(1, weight.shape[1]))
    with torch.autocast("cpu", enabled=False):
        for start in range(0, len(weight), height):
            rows = slice(start, start + height)
            own = None if bias is None else bias[rows].float()
            y[:, rows] = multiply(flat, weight[rows].float(), own, rows)
    return y.view(*x.shape[:-1], len(weight))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product, in float32 where that is faster, and in the dtype that both have."""
    if left.dtype is right.dtype and widens(left.dtype, left.device.type):
        with torch.autocast("cpu", enabled=False):
            return (left.float() @ right.float()).to(left.dtype)
    return left @ right
