"""What parts of a block gave in one pass, so that they need not run in those to come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .calls import forward_replaced
from .hooks import hooked


class Kept:
    """What settled parts of a block, children of it, gave of every batch: it stands in for them.

    Kept is what is one tensor, or a tuple of one and of nothing else, as attention gives it, and as large as the hidden
    states at the most. Another part runs as ever, and so does one behind a part that is not settled, called again in
    the same pass, or that writes in a mapping that it is given, as Gemma 4 does for later blocks.

    Args:
        store: Makes a list to keep what a part gave in.
    """

    def __init__(self, store: Callable[[], MutableSequence[Tensor]]) -> None:
        self._store = store
        self._blocks: dict[nn.Module, tuple[dict[nn.Module, _Part], list[nn.Module]]] = {}

    def settle(self, block: nn.Module, settled: Collection[nn.Module], others: Collection[nn.Module]) -> None:
        """Nothing in `settled`, children of `block`, changes from now on, nor its hidden states; `others` may."""
        parts, _ = self._blocks.get(block, ({}, []))
        self._blocks[block] = {part: parts.get(part) or _Part(self._store()) for part in settled}, list(others)

    def forget(self, block: nn.Module) -> None:
        """Run the whole of `block` again."""
        self._blocks.pop(block, None)

    @contextmanager
    def standing_in(self, block: nn.Module, batch: int, most: int) -> Iterator[None]:
        """For one pass of `block` over a batch, whose hidden states take `most` bytes."""
        parts, others = self._blocks.get(block, ({}, []))
        if not parts:
            yield
            return
        ran: list[nn.Module] = []  # parts that may give something else in the next pass

        def note(part: nn.Module) -> Callable[..., None]:
            return lambda module, args, kwargs: ran.append(part)

        def forward(module: nn.Module, part: _Part) -> Callable[..., Any]:
            own, called = module.forward, False

            def stand_in(*args: Any, **kwargs: Any) -> Any:
                nonlocal called
                again, called = called, True
                if not again and batch < len(part.outputs):
                    return part.output(batch)
                mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
                before = [dict(mapping) for mapping in mappings]
                output = own(*args, **kwargs)
                if not again and batch == len(part.outputs) and not ran and not any(map(_differ, mappings, before)):
                    part.keep(output, most)
                return output

            return stand_in

        with (
            forward_replaced([(module, forward(module, part)) for module, part in parts.items()]),
            # a part may be used by what is in it alone, as a list of experts is
            hooked({module: note(part) for part in others for module in part.modules()}),
        ):
            yield


def _differ(mapping: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return len(mapping) != len(before) or any(value is not before.get(key) for key, value in mapping.items())


class _Part:
    """What one part gave, batch by batch. Copies, as a block may write over what it is given."""

    def __init__(self, outputs: MutableSequence[Tensor]) -> None:
        self.outputs = outputs
        self._rest: tuple[None, ...] | None = None

    def keep(self, output: Any, most: int) -> None:
        """Keep what the part gave of the next batch, if it can be kept."""
        first, rest = (output[0], output[1:]) if type(output) is tuple and output else (output, None)
        if isinstance(first, Tensor) and first.nbytes <= most and not any(item is not None for item in rest or ()):
            self.outputs.append(first.detach().clone())
            self._rest = rest

    def output(self, batch: int) -> Any:
        """What it gave of a batch, as it gave it."""
        first = self.outputs[batch].clone()
        return first if self._rest is None else (first, *self._rest)
