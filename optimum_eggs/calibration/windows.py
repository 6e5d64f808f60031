"""Any calibration source to token windows (num_samples, seq_len)."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, shorten
from .documents import (
    SOURCES,
    Column,
    check_name,
    columns_of,
    documents,
    is_tokenised,
    refuse_splits,
    refuse_twice,
    shown,
)
from .pieces import PIECE, token_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_POOL = 4  # from a large source, this many times the tokens needed are read, and the windows drawn from those
_LARGE = 1 << 21  # characters; of a single text that is longer, only a stretch is tokenised
_LONGEST_TOKEN = 8  # characters, roughly: a piece of so many times the tokens wanted holds them
_LEAST = 8  # a text that is too short must have this part of the tokens asked for


@dataclass(frozen=True)
class Windows:
    """Calibration windows.

    Attributes:
        ids: Token ids (windows, seq_len), int64.
        overlapping: Whether the text was too short for windows of its own, so that evenly spread ones share tokens.
        texts: The sources, as [`described`][optimum_eggs.calibration.documents.described].
    """

    ids: Tensor
    overlapping: bool = False
    texts: list[dict[str, Any]] = field(default_factory=list)


def token_windows(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_samples: int,
    seq_len: int,
    sampling: str = "random",
    seed: int = 0,
    **loading: Any,
) -> Windows:
    """Calibration windows of a source.

    Texts are joined with blank lines and tokenised without special tokens. `"sequential"` takes the first windows, end
    to end; `"random"` draws starts uniformly with `seed` (from a source of many texts, or of one that is longer than
    2 Mi characters: within a stretch that starts at a random text or line). Windows given as token ids of exactly
    `seq_len` are taken as they are. A mapping of sources to shares gives each its share of the windows, by largest
    remainder.

    A text that is too short for num_samples windows is cut into as many that overlap, whose starts are spread evenly,
    if it has an eighth of the tokens, at least two windows of them, and a start for each.

    Args:
        source: As for [`documents`], or token ids, or a mapping of sources to shares.
        tokenizer: Not needed for token ids.
        num_samples: Number of windows.
        seq_len: Tokens in each.
        sampling: `"random"` or `"sequential"`.
        seed: Of what is random.
        loading: Where to find the text in a data set: as for [`documents`].

    Raises:
        CalibrationError: no source, an unknown kind of source, or too few tokens.
        ConfigError: a mapping names one source twice.
    """
    check_calibration(source)
    if isinstance(source, Mapping):
        columns = dict(zip(source, columns_of(source, loading.pop("text_column", None)), strict=True))

        def draw(name: Any, count: int) -> Windows:
            return token_windows(
                name,
                tokenizer,
                num_samples=count,
                seq_len=seq_len,
                sampling=sampling,
                seed=seed,
                text_column=columns[name],
                **loading,
            )

        return _mixed(source, num_samples, seed, draw)
    generator = torch.Generator().manual_seed(seed)
    ids = given_ids(source)
    if ids is None:
        needed = num_samples * seq_len
        ids = _read(documents(source, **loading), tokenizer, needed, sampling, generator)
    called = f"calibration={shown(source)}" if isinstance(source, str | Path) else "calibration: the text"
    if ids.dim() == 2:
        return _choose(ids, num_samples, seq_len, sampling, generator, called)
    return _cut(ids, num_samples, seq_len, sampling, generator, called)


def token_stream(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, pool: int | None = None) -> Tensor:
    """Token ids (tokens,) of the texts joined with blank lines, without special tokens: those of the joined text.

    Rows of token ids are joined as they are. With `pool`, reading stops when there are at least that many tokens.

    Raises:
        CalibrationError: there is no tokenizer.
    """
    rows: Iterable[list[int]]
    if isinstance(texts, Column) and texts.holds_ids:
        rows = texts
    else:
        if tokenizer is None:
            raise CalibrationError("tokenizer=None: text needs a tokenizer; pass one, or pass token ids")
        size = PIECE if pool is None else min(PIECE, _LONGEST_TOKEN * pool)
        rows = token_pieces(texts, _encoder(tokenizer), size)
    parts = [torch.tensor(row, dtype=torch.int64) for row in _up_to(rows, pool)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def windows_digest(windows: Tensor) -> str:
    """SHA-256 of the windows' token ids as little-endian int64: two runs with the same one saw the same data."""
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def shares(
    weights: Mapping[Any, float], total: int, argument: str = "calibration", more: str = "num_samples"
) -> list[int]:
    """Split `total` in proportion to `weights`, by largest remainder.

    `argument` and `more` are what an error names: the mapping, and what makes `total` greater.

    Raises:
        CalibrationError: a weight is not a positive number, or too small for one of them.

    >>> shares({"a": 0.7, "b": 0.3}, 32)
    [22, 10]
    """
    for name, weight in weights.items():
        check_share(name, weight, argument)
    _, exponent = math.frexp(max(weights.values()))
    relative = [math.ldexp(weight, -exponent) for weight in weights.values()]  # the same bits, and a finite sum
    exact = [total * weight / sum(relative) for weight in relative]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for name, count in zip(weights, counts, strict=True):
        if not count:
            raise CalibrationError(
                f"{argument}: the share {weights[name]!r} of {shorten(name)} is too small for one of {total} windows; "
                f"give it more, raise {more}, or leave it out"
            )
    return counts


def check_calibration(source: Any) -> None:
    """Raise if it can be told from a calibration source itself that it is none; nothing of it is read.

    Raises:
        CalibrationError: there is none, a name is none of a text, or a share no positive number.
        ConfigError: a mapping names one source twice.
    """
    if source is None:
        raise CalibrationError(f"calibration=None: pass {SOURCES}; or texts or token ids")
    refuse_splits(source, "calibration")
    if not isinstance(source, Mapping):
        check_name(source, "calibration")
        return
    refuse_twice(source, "calibration")
    for name, share in source.items():
        check_share(name, share)
        check_name(name, "calibration")


def check_share(name: Any, share: Any, argument: str = "calibration") -> None:
    """Raise unless the share of a source is a positive number.

    Raises:
        CalibrationError: it is not.
    """
    known = isinstance(share, int | float) and not isinstance(share, bool)
    if not known or not 0 < share <= sys.float_info.max:
        raise CalibrationError(
            f"{argument}: the share {shorten(share)} of {shorten(name)} is not a positive number; shares are "
            "relative, as in {'c4': 3, 'wikitext2': 1}"
        )


def _mixed(source: Mapping[Any, float], num_samples: int, seed: int, draw: Callable[[Any, int], Windows]) -> Windows:
    if not source:
        raise CalibrationError("calibration={}: the mapping is empty; name at least one source")
    parts = [draw(name, count) for name, count in zip(source, shares(source, num_samples), strict=True)]
    # Mixed within batches, so that no batch is of one kind of text alone.
    ids = torch.cat([part.ids for part in parts])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return Windows(ids[order], any(part.overlapping for part in parts))


def needs_tokenizer(source: Any, text_column: str | None = None) -> bool:
    """Whether windows of `source` take a tokenizer: no source at all and token ids take none."""
    if source is None or (text_column is None and is_tokenised(source)):
        return False
    return isinstance(source, Mapping) or given_ids(source) is None


def given_ids(source: Any) -> Tensor | None:
    """Token ids, if that is what `source` holds: (tokens,) or windows (N, T) of one length. Otherwise None."""
    if isinstance(source, str):
        return None
    if isinstance(source, Tensor) or type(source).__module__ == "numpy":
        ids = torch.as_tensor(source)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
            raise CalibrationError(
                f"calibration: token ids of dtype {ids.dtype} and shape {tuple(ids.shape)}; pass integers of shape "
                "(tokens,) or (windows, seq_len)"
            )
        return ids.to(torch.int64).cpu()
    if not isinstance(source, Sequence) or not len(source):
        return None
    if all(isinstance(item, int) for item in source):
        return torch.tensor(source, dtype=torch.int64)
    if all(isinstance(row, Sequence) and not isinstance(row, str) for row in source):
        if not all(isinstance(item, int) for row in source for item in row):
            raise CalibrationError(
                "calibration: lists within a list must hold token ids (integers); pass texts as one list of strings"
            )
        if len({len(row) for row in source}) == 1:
            return torch.tensor(source, dtype=torch.int64)
        return torch.tensor([item for row in source for item in row], dtype=torch.int64)
    return None


def _read(
    texts: Sequence[str] | Column,
    tokenizer: PreTrainedTokenizerBase | None,
    needed: int,
    sampling: str,
    generator: torch.Generator,
) -> Tensor:
    """Token ids: as many as are needed, or a pool to draw from. Rows of ids that are of one length stay rows."""
    pool: int | None = needed
    if sampling == "random":
        texts, pool = _from_somewhere(texts, needed * _POOL, generator)
    if isinstance(texts, Column) and texts.holds_ids:
        ids = given_ids(list(_up_to(texts, pool)))
        return torch.empty(0, dtype=torch.int64) if ids is None else ids
    return token_stream(texts, tokenizer, pool)


def _from_somewhere(
    texts: Sequence[str] | Column, pool: int, generator: torch.Generator
) -> tuple[Sequence[str] | Column, int | None]:
    """Texts from a random one on, then those before it; of one alone, that from a random line on if it is large.

    Beside them the tokens to read: one text that is not large is read to its end.
    """
    count = len(texts)
    if count > 1:
        start = int(torch.randint(count, (1,), generator=generator))
        return (texts.select_from(start) if isinstance(texts, Column) else [*texts[start:], *texts[:start]]), pool
    if count == 0 or (isinstance(texts, Column) and texts.holds_ids):
        return texts, pool
    (text,) = texts
    if len(text) <= _LARGE:
        return [text], None
    start = int(torch.randint(len(text), (1,), generator=generator))
    start = text.find("\n", start) + 1 or start
    return [text[start:], text[:start]], pool


def _up_to(rows: Iterable[list[int]], pool: int | None) -> Iterator[list[int]]:
    """Rows until they have so many tokens together."""
    total = 0
    for row in rows:
        yield row
        total += len(row)
        if pool is not None and total >= pool:
            return


def _choose(
    rows: Tensor, num_samples: int, seq_len: int, sampling: str, generator: torch.Generator, called: str
) -> Windows:
    """Windows from rows of ids: the rows themselves if they are seq_len long, else cut from their concatenation."""
    if rows.shape[1] != seq_len:
        return _cut(rows.flatten(), num_samples, seq_len, sampling, generator, called)
    if len(rows) < num_samples:
        raise CalibrationError(
            f"calibration: {len(rows)} windows of {seq_len} tokens given, and num_samples={num_samples} are needed; "
            "lower num_samples"
        )
    if sampling == "sequential":
        return Windows(rows[:num_samples])
    return Windows(rows[torch.randperm(len(rows), generator=generator)[:num_samples]])


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    # verbose=False: a text longer than the model's context is what is wanted here
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _cut(
    ids: Tensor, num_samples: int, seq_len: int, sampling: str, generator: torch.Generator, called: str
) -> Windows:
    """Windows from a stream of ids (tokens,)."""
    needed = num_samples * seq_len
    if len(ids) < needed:
        return _overlapping(ids, num_samples, seq_len, called)
    if sampling == "sequential":
        return Windows(ids[:needed].view(num_samples, seq_len))
    starts = torch.randint(len(ids) - seq_len + 1, (num_samples,), generator=generator)
    return Windows(ids.unfold(0, seq_len, 1)[starts])


def _overlapping(ids: Tensor, num_samples: int, seq_len: int, called: str) -> Windows:
    """Windows from fewer tokens than they have together, with starts spread evenly."""
    needed = num_samples * seq_len
    least = min(needed, max(2 * seq_len, -(-needed // _LEAST), seq_len + num_samples - 1))
    if len(ids) < least:
        fewer = "" if least == needed else f", or {least} at the least for windows that overlap"
        raise CalibrationError(
            f"{called} has {len(ids)} tokens, and num_samples={num_samples} windows of seq_len={seq_len} "
            f"need {needed}{fewer}; give more text, or lower num_samples or seq_len"
        )
    logger.warning(
        "%s has %d tokens, and num_samples=%d windows of seq_len=%d need %d; the windows overlap",
        called,
        len(ids),
        num_samples,
        seq_len,
        needed,
    )
    starts = torch.arange(num_samples) * (len(ids) - seq_len) // (num_samples - 1)
    return Windows(ids.unfold(0, seq_len, 1)[starts], overlapping=True)
