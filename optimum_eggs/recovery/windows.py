"""The windows that recovery trains on, and those that it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.documents import columns_of, documents, shown
from ..calibration.windows import shares, token_stream
from ..errors import CalibrationError

if TYPE_CHECKING:
    from .recover import RecoverySettings

_MOST_HELD_OUT = 16  # windows: judging more of them took time from training


def training_windows(settings: RecoverySettings, tokenizer: Any, processes: int = 1) -> tuple[Tensor, Tensor]:
    """Windows to train on, shuffled with the seed, and windows held out, (windows, seq_len) each. A `seq_len` is given.

    Of every text twice as much is read as all steps of all processes together need, or as its share of them. Those held
    out, unless `held_out` is 0, are its end: windows from between those that are trained on are of the same articles,
    and look better than a text that is not known.

    Raises:
        CalibrationError: a text holds not one window, the texts together fewer than four of which some are to be held
            out, or a share is too small for one.
    """
    assert settings.seq_len is not None
    most = settings.steps * settings.batch_size * processes
    shared = shares(settings.train, most, "train", "steps") if isinstance(settings.train, Mapping) else None
    wanted = shared or [most] * len(settings.train)
    columns = columns_of(settings.train, settings.text_column)
    rows = [
        _windows(source, column, tokenizer, 2 * each, settings.seq_len)
        for source, column, each in zip(settings.train, columns, wanted, strict=True)
    ]
    total = sum(map(len, rows))
    if total < 4 and settings.held_out:
        raise CalibrationError(
            f"train={list(settings.train)}: {total} windows of {settings.seq_len} tokens are in it, and "
            "training needs four; give more text, a smaller seq_len, or held_out=0"
        )
    wished = max(2, round(settings.held_out * min(total, most))) if settings.held_out else 0
    count = min(_MOST_HELD_OUT, total // 2, wished)
    sizes = [min(each, len(row)) if shared else len(row) for row, each in zip(rows, wanted, strict=True)]
    dealt = [count * windows // sum(sizes) for windows in accumulate(sizes, initial=0)]  # to each text its share
    ends = [max(0, len(row) - (after - before)) for row, (before, after) in zip(rows, pairwise(dealt), strict=True)]
    held_out = torch.cat([row[end:] for row, end in zip(rows, ends, strict=True)])
    generator = torch.Generator().manual_seed(settings.seed)
    parts = [row[:end] for row, end in zip(rows, ends, strict=True)]
    if shared:
        parts = [_shuffled(part, generator)[:each] for part, each in zip(parts, wanted, strict=True)]
    return _shuffled(torch.cat(parts), generator)[:most], held_out


def _windows(source: str, column: str | None, tokenizer: Any, most: int, seq_len: int) -> Tensor:
    """The first windows of a text (windows, seq_len), end to end: at least `most`, if it has them."""
    ids = token_stream(documents(source, "train", column, argument="train"), tokenizer, most * seq_len)
    if len(ids) < seq_len:
        raise CalibrationError(
            f"train={shown(source)} has {len(ids)} tokens, and one window of seq_len={seq_len} needs {seq_len}; give "
            "more text, a smaller seq_len, or leave it out"
        )
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def _shuffled(windows: Tensor, generator: torch.Generator) -> Tensor:
    return windows[torch.randperm(len(windows), generator=generator)]
