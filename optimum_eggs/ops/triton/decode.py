"""Decoding in Triton: values and bits are read once for all tokens, and spread in registers."""

# Kernels are read by Triton's own compiler: their arguments are addresses and numbers, without annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _WORDS = 16, 4  # rows of a program, and words of 32 positions that it takes at a time


@triton.jit
def _popcount(bits):
    """Number of set bits of each uint32 (Hacker's Delight, 2nd edition, figure 5-2)."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits + (bits >> 8) + (bits >> 16) + (bits >> 24)) & 0x3F


@triton.jit
def _kernel(
    x,
    values,
    meta,
    bias,
    y,
    tokens,
    rows,
    columns,
    width,
    meta_width,
    kept_of_word,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    lane = tl.arange(0, 32)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, tl.cdiv(columns, 32), WORDS):
        word = first + tl.arange(0, WORDS)
        bits = tl.zeros((ROWS, WORDS), tl.uint32)
        for i in tl.static_range(4):
            byte = word * 4 + i
            there = (row < rows)[:, None] & (byte < meta_width)[None, :]
            read = tl.load(meta + row[:, None] * meta_width + byte[None, :], mask=there, other=0)
            bits |= read.to(tl.uint32) << (8 * i)
        kept = ((bits[:, :, None] >> lane[None, None, :]) & 1) != 0
        before = bits[:, :, None] & ((1 << lane) - 1)[None, None, :].to(tl.uint32)
        # m divides 32, so the values of a word start at a place that does not depend on the bits.
        at = word[None, :, None] * kept_of_word + _popcount(before).to(tl.int32)
        there = kept & (row < rows)[:, None, None] & (at < width)
        weight = tl.load(values + row[:, None, None] * width + at, mask=there, other=0).to(tl.float32)
        weight = tl.reshape(weight, (ROWS, WORDS * 32))
        column = first * 32 + tl.arange(0, WORDS * 32)
        there = (token < tokens)[:, None] & (column < columns)[None, :]
        taken = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0).to(tl.float32)
        total += tl.sum(weight[:, None, :] * taken[None, :, :], 2)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    place = token[None, :] * rows + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


def decode(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """X (..., in) to (..., out). All contiguous, on one device, of one dtype; sums in float32.

    Made for few tokens: a program holds all of them.
    """
    rows, width = weight.shape
    columns = x.shape[-1]
    tokens = x.numel() // columns
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _kernel[(triton.cdiv(rows, _ROWS),)](
            x,
            weight,
            weight_meta,
            weight if bias is None else bias,
            y,
            tokens,
            rows,
            columns,
            width,
            weight_meta.shape[1],
            32 // m * n,
            HAS_BIAS=bias is not None,
            TOKENS=triton.next_power_of_2(tokens),
            ROWS=_ROWS,
            WORDS=_WORDS,
        )
    return y
