"""Long texts to token ids a piece at a time, with the ids that the whole would have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

SEPARATOR = "\n\n"
PIECE = 1 << 17  # characters tokenised at a time; a tokenizer takes some 150 bytes of memory for every one
_SHORTEST = 1 << 12
_AROUND = (256, 251, 239)  # characters on either side of a cut that are looked at; within "aaaa…" one would not tell
_TRIES = 32  # places of each kind that are looked at


def token_pieces(
    texts: Iterable[str], encode: Callable[[str], list[int]], size: int = PIECE, separator: str = SEPARATOR
) -> Iterator[list[int]]:
    """Token ids of `separator.join(texts)`, in pieces of about `size` characters; texts are read as they are needed.

    A tokenizer does not see across a cut, and may give other ids there. So a cut is made only where the characters
    around it have the same ids with it and without it. Where there is no such place the piece is longer.
    """
    size = max(size, _SHORTEST)
    waiting, begun, limit, drop = "", False, size, 0
    for text in texts:
        waiting += separator + text if begun else text
        begun, start = True, 0
        while len(waiting) - start > limit:
            cut = _cut(waiting, start, start + limit, encode)
            if cut is None:
                limit += size
                continue
            yield encode(waiting[start : cut.end])[drop:]
            start, drop, limit = cut.begin, cut.drop, size
        waiting = waiting[start:]
    if waiting:
        yield encode(waiting)[drop:]


class _Cut(NamedTuple):
    """A piece ends at `end`, the next begins at `begin`, of whose ids the first `drop` are not the text's."""

    end: int
    begin: int
    drop: int = 0


def _cut(text: str, start: int, end: int, encode: Callable[[str], list[int]]) -> _Cut | None:
    """Where the piece that begins at `start` may end: the last safe place before `end`."""
    for places in (_words, _lines, _letters):
        for cut in islice(places(text, max(start + 1, end - _SHORTEST), end), _TRIES):
            if all(_is_safe(text, max(start, cut.end - n), cut, cut.begin + n, encode) for n in _AROUND):
                return cut
    return None


def _is_safe(text: str, low: int, cut: _Cut, high: int, encode: Callable[[str], list[int]]) -> bool:
    """Whether `text[low:high]` has the ids of its two parts."""
    return encode(text[low:high]) == encode(text[low : cut.end]) + encode(text[cut.begin : high])[cut.drop :]


def _words(text: str, low: int, high: int) -> Iterator[_Cut]:
    """Single spaces between words: before the space, or in place of it, as tokenizers have it that add one in front."""
    at = text.rfind(" ", low, high)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1 : at + 2].isspace():
            yield _Cut(at, at)
            yield _Cut(at, at + 1)
        at = text.rfind(" ", low, at)


def _lines(text: str, low: int, high: int) -> Iterator[_Cut]:
    """Beginnings of lines that are not empty."""
    at = text.rfind("\n", low, high)
    while at > 0:
        if not text[at + 1 : at + 2].isspace():
            yield _Cut(at + 1, at + 1)
        at = text.rfind("\n", low, at)


def _letters(text: str, low: int, high: int) -> Iterator[_Cut]:
    """Anywhere that is not beside a space, for writing without any; what a tokenizer adds in front is dropped."""
    for at in range(high - 1, low, -1):
        if not text[at - 1].isspace() and not text[at].isspace():
            yield _Cut(at, at)
            yield _Cut(at, at, 1)
