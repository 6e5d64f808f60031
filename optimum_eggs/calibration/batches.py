"""Calibration windows to the batches that pass through the blocks, with short windows cut from them."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORT = 8  # tokens: a model settles at its first few where attention is to rest


def batches_of(windows: Tensor, batch_size: int, short_share: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Windows (windows, tokens) in batches; then short windows of 8 tokens, cut from them at random with `seed`.

    They are cut from one window after another, `batch_size` or a multiple of it, and together have that share of the
    windows' tokens, or less.

    >>> windows = torch.arange(256).view(4, 64)
    >>> [tuple(batch.shape) for batch in batches_of(windows, 2, short_share=0.75)]
    [(2, 64), (2, 64), (16, 8), (8, 8)]
    """
    batches = list(windows.split(batch_size))
    count, tokens = windows.shape
    short = short_count(count, tokens, batch_size, short_share)
    if short:
        together, length = short_batch(batch_size, tokens)
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(tokens - length + 1, (short,), generator=generator)
        batches += windows.unfold(1, length, 1)[torch.arange(short) % count, starts].split(together)
    return batches


def short_count(windows: int, tokens: int, batch_size: int, short_share: float) -> int:
    """How many short windows there are besides so many windows of so many tokens: a multiple of `batch_size`.

    >>> short_count(16, 512, 1, 0.125), short_count(8, 16, 4, 0.125)
    (128, 0)
    """
    _, length = short_batch(batch_size, tokens)
    return int(short_share * windows * tokens / length) // batch_size * batch_size


def short_batch(batch_size: int, tokens: int) -> tuple[int, int]:
    """Short windows in a batch, and tokens in each, so that they have together what a batch of windows of `tokens` has.

    >>> short_batch(2, 512), short_batch(1, 6)
    ((128, 8), (1, 6))
    """
    length = min(_SHORT, tokens)
    return batch_size * (tokens // length), length
