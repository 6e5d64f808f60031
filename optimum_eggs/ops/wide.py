"""Products of 16 bits made in float32, where that is faster: on processors with AVX2 alone.

torch casts 16 bits there one number at a time, in every product; cast once, they are multiplied many times as fast.
What comes out is rounded once, as by the kernels of 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import INSTRUCTION_SETS

_NUMBERS = 1 << 22  # of a weight in float32 at a time
_INSTRUCTION_SETS = ("avx2",)  # measured with benchmarks/layers.py; others multiply 16 bits, or were not at hand


def widens(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of many tokens in `dtype` are faster in float32."""
    halves = dtype in (torch.bfloat16, torch.float16)
    return halves and device_type == "cpu" and INSTRUCTION_SETS[-1:] == _INSTRUCTION_SETS


def row_parts(rows: int, width: int) -> list[slice]:
    """Rows of a weight (rows, width) that are in float32 together."""
    height = max(64, _NUMBERS // max(1, width))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b of tensors of one dtype, x (..., in) and weight (out, in), in float32, and rounded to that dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    y = x.new_empty((len(flat), len(weight)))
    with torch.autocast("cpu", enabled=False):
        for rows in row_parts(*weight.shape):
            own = None if bias is None else bias[rows].float()
            y[:, rows] = torch.nn.functional.linear(flat, weight[rows].float(), own)
    return y.view(*x.shape[:-1], len(weight))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product, in float32 where that is faster, and in the dtype that both have."""
    if left.dtype is right.dtype and widens(left.dtype, left.device.type):
        with torch.autocast("cpu", enabled=False):
            return (left.float() @ right.float()).to(left.dtype)
    return left @ right
