"""Any calibration source to token windows (num_samples, seq_len)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .documents import documents, rotated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
_POOL = 4  # from a large source, this many times the tokens needed are read, and the windows drawn from those
_PIECE = 1 << 17  # characters tokenised at a time


def token_windows(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_samples: int,
    seq_len: int,
    sampling: str = "random",
    seed: int = 0,
    split: str | None = None,
    text_column: str | None = None,
) -> Tensor:
    """Calibration windows (num_samples, seq_len), int64.

    Texts are joined with blank lines and tokenised without special tokens. `"sequential"` takes the first windows, end
    to end; `"random"` draws starts uniformly with `seed` (from a source of many texts: within a stretch of
    consecutive ones that starts at a random text). Windows given as token ids of exactly `seq_len` are taken as they
    are. A mapping of sources to shares gives each its share of the windows, by largest remainder.

    Raises:
        CalibrationError: no source, an unknown kind of source, or fewer tokens than num_samples · seq_len.
    """
    if source is None:
        raise CalibrationError("calibration=None: pass a text file, the name of a data set, texts or token ids")
    if isinstance(source, Mapping):
        return _mixed(source, tokenizer, num_samples, seq_len, sampling, seed, split, text_column)
    generator = torch.Generator().manual_seed(seed)
    ids = given_ids(source)
    if ids is not None and ids.dim() == 2:
        return _choose(ids, num_samples, seq_len, sampling, generator)
    if ids is None:
        pool = num_samples * seq_len * (_POOL if sampling == "random" else 1)
        texts = documents(source, split, text_column)
        if sampling == "random" and isinstance(texts, Sized) and len(texts) > 1:
            texts = rotated(texts, int(torch.randint(len(texts), (1,), generator=generator)))
        ids = token_stream(texts, tokenizer, pool)
    return _cut(ids, num_samples, seq_len, sampling, generator)


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase | None, pool: int | None = None) -> Tensor:
    """Token ids (tokens,) of the texts joined with blank lines, without special tokens.

    Long texts are tokenised in pieces of 128 Ki characters that end with a line. With `pool`, reading stops when
    there are at least that many tokens.

    Raises:
        CalibrationError: there is no tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError("tokenizer=None: text needs a tokenizer; pass one, or pass token ids")
    parts: list[Tensor] = []
    chunk: list[str] = []
    size = 0
    for text in texts:
        if not text:
            continue
        chunk.append(text)
        size += len(text)
        if pool is not None and size > 8 * pool:  # characters; should they be too few tokens, there is another round
            parts += _encode(SEPARATOR.join(chunk) + SEPARATOR, tokenizer)
            chunk, size = [], 0
            if sum(len(part) for part in parts) >= pool:
                break
    if chunk:
        parts += _encode(SEPARATOR.join(chunk), tokenizer)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def windows_digest(windows: Tensor) -> str:
    """SHA-256 of the windows' token ids as little-endian int64: two runs with the same one saw the same data."""
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def shares(weights: Mapping[Any, float], total: int) -> list[int]:
    """Split `total` in proportion to `weights`, by largest remainder.

    Raises:
        CalibrationError: a weight is not a positive number.

    >>> shares({"a": 0.7, "b": 0.3}, 32)
    [22, 10]
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise CalibrationError(
                f"calibration: the share {weight!r} of {name!r} is not a positive number; shares are relative, as in "
                "{'c4': 3, 'wikitext2': 1}"
            )
    exact = [total * weight / sum(weights.values()) for weight in weights.values()]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _mixed(
    source: Mapping[Any, float],
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    sampling: str,
    seed: int,
    split: str | None,
    text_column: str | None,
) -> Tensor:
    if not source:
        raise CalibrationError("calibration={}: the mapping is empty; name at least one source")
    parts = []
    for (name, _), count in zip(source.items(), shares(source, num_samples), strict=True):
        if count:
            part = token_windows(
                name,
                tokenizer,
                num_samples=count,
                seq_len=seq_len,
                sampling=sampling,
                seed=seed,
                split=split,
                text_column=text_column,
            )
            parts.append(part)
    # Mixed within batches, so that no batch is of one kind of text alone.
    windows = torch.cat(parts)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


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


def _choose(rows: Tensor, num_samples: int, seq_len: int, sampling: str, generator: torch.Generator) -> Tensor:
    """Windows from rows of ids: the rows themselves if they are seq_len long, else cut from their concatenation."""
    if rows.shape[1] != seq_len:
        return _cut(rows.flatten(), num_samples, seq_len, sampling, generator)
    if len(rows) < num_samples:
        raise CalibrationError(
            f"calibration: {len(rows)} windows of {seq_len} tokens given, and num_samples={num_samples} are needed; "
            "lower num_samples"
        )
    if sampling == "sequential":
        return rows[:num_samples]
    return rows[torch.randperm(len(rows), generator=generator)[:num_samples]]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of the pieces of a text."""
    # verbose=False: a text longer than the model's context is what is wanted here
    ids = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in _pieces(text))
    return [torch.tensor(piece, dtype=torch.int64) for piece in ids]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends: a tokenizer takes some 150 bytes of memory for every character it is given."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(ids: Tensor, num_samples: int, seq_len: int, sampling: str, generator: torch.Generator) -> Tensor:
    needed = num_samples * seq_len
    if len(ids) < needed:
        raise CalibrationError(
            f"calibration: the text has {len(ids)} tokens, and num_samples={num_samples} windows of seq_len={seq_len} "
            f"need {needed}; give more text, or lower num_samples or seq_len"
        )
    if sampling == "sequential":
        return ids[:needed].view(num_samples, seq_len)
    starts = torch.randint(len(ids) - seq_len + 1, (num_samples,), generator=generator)
    return ids.unfold(0, seq_len, 1)[starts]
