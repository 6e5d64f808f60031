"""How a model calls its blocks: recorded in a pass in which none of them computes, to be done again one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .handed import Handed, Taken, is_shelf
from .hooks import Stop
from .providers import BlockProvider


@dataclass(frozen=True)
class Call:
    """How a model calls a block: the arguments besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def apply(self, block: nn.Module, hidden: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Call `block` on `hidden`, and return the hidden states it gives, and what it gives behind them."""
        if self.by_keyword:
            output = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return (output, ()) if isinstance(output, Tensor) else (output[0], tuple(output[1:]))

    def changed(self, change: Callable[[Any], Any]) -> Call:
        """The same with other arguments."""
        return Call(change(self.args), change(self.kwargs), self.by_keyword)


_KNOWN = 8  # tensors of a shape that others are compared with

DONE = Call((), {}, False)
"""Of a block that the windows have passed: its call is not needed again."""


def record_calls(
    provider: BlockProvider, first: nn.Module, batch: Tensor, output: list[Any]
) -> tuple[Tensor, Handed, list[Call]]:
    """Run the model with blocks that only record how they are called.

    `output` holds what block 0 really returns, once it ran: the others return the like of it.

    Returns:
        Block 0's input, what else is handed to it, and the calls, with places for what is handed on.

    Raises:
        ModelError: the model does not call each block once, in order, with what the block before gave.
    """
    count = len(provider)
    calls: dict[int, Call] = {}
    states: list[Tensor] = []
    taken = Taken()
    run_first = first.forward

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_keyword = not (args and isinstance(args[0], Tensor))
            hidden = kwargs.pop("hidden_states", None) if by_keyword else args[0]
            if not isinstance(hidden, Tensor) or index != len(calls):
                raise ModelError(
                    f"block {index} is called out of order, more than once, or without hidden states; such a model "
                    "cannot be walked block by block, unless `block_list` names another list"
                )
            call = Call(args if by_keyword else args[1:], kwargs, by_keyword)
            calls[index] = call.changed(taken.out_of)
            if index and hidden is not states[-1] and not torch.equal(hidden, states[-1].to(hidden)):
                raise ModelError(
                    f"block {index} does not get the hidden states that block {index - 1} gives: the model changes "
                    "them in between, which a walk block by block leaves out; switch that off in its config.json "
                    "(`rescale_every=0` for RWKV) and load it again, or name another list by `block_list`"
                )
            states.append(hidden)
            if index == count - 1:
                raise Stop
            if not output:  # shows whether blocks return a tensor, or a tuple that begins with one
                again = {"hidden_states": hidden} if by_keyword else {}
                output.append(run_first(*args, **again, **kwargs))
            return hidden if isinstance(output[0], Tensor) else (hidden, *taken.give(index, output[0][1:]))

        return forward

    with forward_replaced([(provider.skeleton(i), stand_in(i)) for i in range(count)]), suppress(Stop):
        provider.run(batch)
    if len(calls) != count:
        raise ModelError(
            f"the model ran {len(calls)} of its {count} blocks; it cannot be walked block by block, unless "
            "`block_list` names another list"
        )
    return states[0], taken.first, [calls[i] for i in range(count)]


@contextmanager
def forward_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have each module run something else, for a while."""
    # `forward` may sit on the instance already (accelerate puts its hooks there), so it is put back as it was.
    before = [module.__dict__.get("forward") for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.forward = forward
        yield
    finally:
        for (module, _), old in zip(pairs, before, strict=True):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = old


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it cast."""
    if is_shelf(value):
        made = copy.copy(value)
        made.update({key: cast(item, dtype) for key, item in value.items()})
        return made
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def shared(value: Any, pool: dict[tuple, list[Tensor]]) -> Any:
    """`value` with equal tensors made one: every batch brings the same masks and rotary tables.

    What differs from all that came before is looked for no more behind some others of its shape.
    """
    if isinstance(value, dict):
        return {key: shared(item, pool) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(shared(item, pool) for item in value)
    if isinstance(value, Tensor):
        known = pool.setdefault((value.shape, value.dtype, value.device), [])
        for other in known:
            if other is value or torch.equal(other, value):
                return other
        if len(known) < _KNOWN:
            known.append(value)
    return value
