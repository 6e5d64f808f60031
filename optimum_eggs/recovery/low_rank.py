"""A low-rank product at the kept positions of a packed layer, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import gather, spread
from ..ops.watch import transforms, wants_torch_alone
from ..pattern import NMPattern

_CHUNK = 1 << 22  # numbers of the dense product that exist at a time


def masked_low_rank(down: Tensor, up: Tensor, weight_meta: Tensor, pattern: NMPattern) -> Tensor:
    """The values that up · down takes at the kept positions, packed.

    The dense product (out, in) never exists: rows are computed, and in the backward pass computed again, a few million
    numbers at a time. What is kept for the backward pass is the arguments. Only under `torch.func`, in forward-mode
    differentiation and in ONNX does the whole product exist.

    Args:
        down: A (r, in).
        up: B (out, r), in the dtype of `down`.
        weight_meta: Bits of the packed layer (out, ⌈in/8⌉), uint8.
        pattern: n kept of every m inputs.

    Returns:
        (out, in·n/m), laid out as the packed layer's `weight`. Differentiable in `down` and `up`.

    >>> meta = torch.tensor([[0b0110], [0b1001]], dtype=torch.uint8)
    >>> masked_low_rank(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0], [10]]), meta, NMPattern(2, 4))
    tensor([[ 2.,  3.],
            [10., 40.]])
    """
    if transforms() or wants_torch_alone():
        return gather(up @ down, weight_meta, pattern)
    return _MaskedLowRank.apply(down, up, weight_meta, pattern)


class _MaskedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, down: Tensor, up: Tensor, weight_meta: Tensor, pattern: NMPattern) -> Tensor:
        ctx.save_for_backward(down, up, weight_meta)
        ctx.pattern = pattern
        parts = []
        for rows in _chunks(len(up), down.shape[1]):
            parts.append(gather(up[rows] @ down, weight_meta, pattern, rows))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        down, up, weight_meta = ctx.saved_tensors
        grad_down, grad_up = torch.zeros_like(down), torch.empty_like(up)
        for rows in _chunks(len(up), down.shape[1]):
            dense = spread(grad[rows].to(down.dtype), weight_meta, ctx.pattern, rows)
            grad_up[rows] = dense @ down.t()
            grad_down.addmm_(up[rows].t(), dense)
        return grad_down, grad_up, None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows that hold at most `_CHUNK` numbers, or one row."""
    height = max(1, _CHUNK // columns)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
