"""`torch.ops.optimum_eggs.attend`: attention of one new token a sequence, without derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import define


def _by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


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
    """
    return torch.ops.optimum_eggs.attend(q, k, v, mask, scale)
