"""`torch.ops.optimum_eggs.attend`: attention of one new token a sequence, without derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from .library import define


def _by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(q, k)
    groups = q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    _check(q, k)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _check(q: Tensor, k: Tensor) -> None:
    """Raise unless each query head of each sequence has keys; torch would make them fit."""
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)}: both need as many sequences, and the heads of "
            "the queries must be a multiple of those of the keys"
        )


define("attend", "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale", _by_torch, _fake)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q Kᵀ · scale) V.

    On a CPU, for one query a sequence, in float32 and bfloat16, it is one kernel, which sums in float32; else it is
    torch's own `scaled_dot_product_attention`. It has no derivatives.

    Args:
        q: (batch, heads, queries, dim).
        k: (batch, kv_heads, length, dim); kv_heads divides heads.
        v: As k.
        mask: (batch or 1, heads or 1, queries, length), boolean, True where a position may be seen; None for all.
        scale: Of the products.

    Returns:
        (batch, queries, heads, dim). Where nothing may be seen it is 0.

    Raises:
        ShapeError: q and k do not belong together.
    """
    return torch.ops.optimum_eggs.attend(q, k, v, mask, scale)
