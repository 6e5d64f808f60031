"""What blocks hand on to later ones besides the hidden states."""

from __future__ import annotations

import copy
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Extra:
    """In the arguments of a block: what block `block` gave `place` places behind its hidden states, as T5 its bias."""

    block: int
    place: int


@dataclass(frozen=True)
class Shelf:
    """In the arguments of a block: the mapping of that number, which all blocks get and write in, as Gemma 4 keys."""

    number: int


@dataclass(frozen=True)
class Handed:
    """What is on its way to the blocks to come, of one batch: nothing in it is written in place."""

    shelves: tuple[MutableMapping[Any, Any], ...] = ()
    extras: dict[Extra, Any] = field(default_factory=dict)

    def copied(self) -> Handed:
        """The same, with mappings that a block may write in."""
        return Handed(tuple(copy.copy(shelf) for shelf in self.shelves), self.extras)

    def behind(self, block: int, extras: Sequence[Any], last: dict[Extra, int]) -> Handed:
        """The same behind a block that gave `extras` behind its hidden states; what none reads any more is left out.

        Args:
            block: Index of the block.
            extras: What it gave.
            last: The last block that reads each of those that any reads.
        """
        found = self.extras | {Extra(block, place): extra for place, extra in enumerate(extras)}
        return Handed(self.shelves, {extra: value for extra, value in found.items() if last.get(extra, block) > block})


class Taken:
    """Takes what is handed on out of arguments, while one batch is recorded.

    Attributes:
        first: What is handed to block 0.
    """

    def __init__(self) -> None:
        self.first = Handed()
        self._shelves: list[MutableMapping[Any, Any]] = []
        self._extras: list[tuple[Tensor, Extra]] = []

    def give(self, block: int, extras: Sequence[Any]) -> tuple[Any, ...]:
        """The like of `extras`, to be known as what `block` gave."""
        given = tuple(extra.view_as(extra) if isinstance(extra, Tensor) else extra for extra in extras)
        self._extras += [(extra, Extra(block, place)) for place, extra in enumerate(given) if isinstance(extra, Tensor)]
        return given

    def out_of(self, value: Any) -> Any:
        """`value` with an [`Extra`] or a [`Shelf`] in place of all that is handed on."""
        if is_shelf(value):
            return self._shelf(value)
        if isinstance(value, dict):
            return {key: self.out_of(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.out_of(item) for item in value)
        return next((extra for known, extra in self._extras if known is value), value)

    def _shelf(self, value: MutableMapping[Any, Any]) -> Shelf:
        for number, known in enumerate(self._shelves):
            if known is value:
                return Shelf(number)
        self._shelves.append(value)
        self.first = Handed((*self.first.shelves, copy.copy(value)))
        return Shelf(len(self._shelves) - 1)


def is_shelf(value: Any) -> bool:
    """Whether it may be a mapping that blocks share, and not one that is made for each of them, as of masks."""
    return isinstance(value, MutableMapping) and not isinstance(value, dict)


def put_back(value: Any, handed: Handed) -> Any:
    """`value` with what is handed on in the places that [`Taken.out_of`] took it from."""
    if isinstance(value, Extra):
        return handed.extras[value]
    if isinstance(value, Shelf):
        return handed.shelves[value.number]
    if isinstance(value, dict):
        return {key: put_back(item, handed) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(put_back(item, handed) for item in value)
    return value


def extras_in(value: Any) -> Collection[Extra]:
    """All that blocks gave, in arguments."""
    if isinstance(value, Extra):
        return [value]
    items = value.values() if isinstance(value, dict) else value if type(value) in (tuple, list) else ()
    return [extra for item in items for extra in extras_in(item)]
