"""The walk: calibration windows pass through a model block by block, and only one block is needed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..measure import Meter
from ..nn import dense_weight
from ..ranks import ALONE, Ranks
from .blocks import BlockList
from .statistics import GramAccumulator


class BlockProvider(Protocol):
    """Where blocks come from: all in memory, or one at a time from somewhere else."""

    def __len__(self) -> int:
        """Number of blocks."""

    def skeleton(self, index: int) -> nn.Module:
        """Block `index`, with or without its weights."""

    def materialise(self, index: int) -> nn.Module:
        """Block `index`, ready to run."""

    def release(self, index: int) -> None:
        """Block `index` is done with."""

    def entered(self) -> None:
        """All windows are before the first block: what is outside the blocks is done with."""

    def run(self, window: Tensor) -> None:
        """Run the whole model on windows (batch, tokens); the walk replaces what its blocks do."""


class InMemoryBlocks:
    """The blocks of a model that is in memory as a whole."""

    def __init__(self, model: nn.Module, block_list: BlockList) -> None:
        self.model, self.blocks = model, block_list.blocks
        self.device = next(model.parameters()).device

    def __len__(self) -> int:
        return len(self.blocks)

    def skeleton(self, index: int) -> nn.Module:
        """Block `index`."""
        return self.blocks[index]

    def materialise(self, index: int) -> nn.Module:
        """Block `index`; it is there already."""
        return self.blocks[index]

    def release(self, index: int) -> None:
        """Nothing: the block stays."""

    def entered(self) -> None:
        """Nothing: the rest of the model stays too."""

    def run(self, window: Tensor) -> None:
        """Run the model on windows (batch, tokens)."""
        self.model(input_ids=window.to(self.device))


@dataclass(frozen=True)
class _Call:
    """How a model calls a block: the arguments besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def apply(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call `block` on `hidden`, and return the hidden states it gives."""
        if self.by_keyword:
            output = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _Stop(Exception):  # noqa: N818 - no error: it ends a pass early
    """Ends a forward pass whose rest is not needed."""


class Walk:
    """Calibration windows on their way through the blocks.

    At any time it holds the hidden states before one block, and what the model passes to each block besides. That
    may differ from block to block (masks, rotary tables); it is recorded in one pass in which no block computes.

    Args:
        provider: Where the blocks come from.
        windows: Token ids (windows, tokens).
        batch_size: Windows run at a time.
        meter: Counts the seconds of `"forward"` and `"statistics"`.
        store: Makes the lists that hidden states are held in: in memory, or on disk.
        ranks: The processes over which the windows of every batch are shared out. Statistics are summed over them, and
            every one of them must ask for the same.

    Attributes:
        hidden: Hidden states before the block at hand, batch by batch, as the pruned blocks before it give them.

    Raises:
        ModelError: the model does not call each of its blocks once, in order, with the hidden states first.
    """

    def __init__(
        self,
        provider: BlockProvider,
        windows: Tensor,
        batch_size: int,
        meter: Meter,
        store: Callable[[], MutableSequence[Tensor]] = list,
        ranks: Ranks = ALONE,
    ) -> None:
        self.provider, self.meter, self.store, self.ranks = provider, meter, store, ranks
        windows, batch_size = ranks.share(windows, batch_size), batch_size // ranks.size
        self.hidden = store()
        self._calls: list[list[_Call]] = []  # [batch][block]
        pool: dict[tuple, list[Tensor]] = {}
        with meter.stage("forward"), torch.no_grad():
            first = provider.materialise(0)
            output: list[Any] = []
            for batch in windows.split(batch_size):
                hidden, calls = _record_calls(provider, first, batch, output)
                self.hidden.append(hidden)
                self._calls.append([_shared(call, pool) for call in calls])
        provider.entered()

    def exchange(self) -> AbstractContextManager[None]:
        """Counts what happens within as exchange with other processes, if there are any."""
        return self.meter.stage("exchange") if self.ranks.size > 1 else nullcontext()

    def stages(self, block: nn.Module, index: int, linears: dict[str, nn.Module]) -> list[list[str]]:
        """The linears of block `index` in the order they run, those that read the same tensor together.

        A linear that no batch reaches, or one reaches more than once, is left out. Where all run in the first batch, as
        without experts, no other is looked at.
        """
        stages: dict[tuple, list[str]] = {}
        placed: set[str] = set()
        for batch in range(len(self.hidden)):
            for name, inputs in self._inputs_seen(block, index, batch, linears).items():
                if name not in placed and len(inputs) == 1:
                    stages.setdefault((batch, *inputs[0]), []).append(name)
                placed.add(name)
            if len(placed) == len(linears):
                break
        with self.exchange():
            return _united(self.ranks.gather(list(stages.values())))

    def _inputs_seen(
        self, block: nn.Module, index: int, batch: int, linears: dict[str, nn.Module]
    ) -> dict[str, list[tuple]]:
        """What identifies the tensors that each linear reads in one batch, in the order they run."""
        seen: dict[str, list[tuple]] = {}
        keep_alive: list[Tensor] = []  # an address must not be reused while it stands for a tensor

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _input(args, kwargs)
                keep_alive.append(x)
                seen.setdefault(name, []).append((x.data_ptr(), x.shape, x.stride(), x.dtype))

            return hook

        with self.meter.stage("forward"), torch.no_grad(), _hooked({linears[k]: note(k) for k in linears}):
            self.run(block, index, batch)
        return seen

    def statistics(self, block: nn.Module, index: int, linear: nn.Module) -> GramAccumulator:
        """The Gram matrix of the inputs of `linear`, one of block `index`, over all windows."""
        weight = dense_weight(linear)
        accumulator = GramAccumulator(weight.shape[1], weight.device)
        with self.meter.stage("forward"), torch.no_grad():
            for batch in range(len(self.hidden)):
                x = self._input_of(linear, block, index, batch)
                if x is not None:
                    with self.meter.stage("statistics"):
                        accumulator.add(x)
        with self.exchange():
            return accumulator.over_all(self.ranks)

    def statistics_together(
        self, block: nn.Module, index: int, linears: Mapping[str, nn.Module]
    ) -> dict[str, GramAccumulator]:
        """The Gram matrices of the inputs of several linears of block `index`, in one pass over all windows."""
        weights = {name: dense_weight(linear) for name, linear in linears.items()}
        found = {name: GramAccumulator(weight.shape[1], weight.device) for name, weight in weights.items()}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                with self.meter.stage("statistics"):
                    found[name].add(_input(args, kwargs))

            return hook

        with self.meter.stage("forward"), torch.no_grad(), _hooked({linears[k]: note(k) for k in linears}):
            for batch in range(len(self.hidden)):
                self.run(block, index, batch)
        with self.exchange():
            return {name: found[name].over_all(self.ranks) for name in linears}

    def input_norms(self, block: nn.Module, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """‖x_j‖₂ of the inputs (in,) of each of the linears of block `index`, over all windows."""
        weights = {name: dense_weight(linear) for name, linear in linears.items()}
        squares = {
            name: torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
            for name, weight in weights.items()
        }

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _input(args, kwargs).flatten(0, -2).to(torch.float32)
                squares[name] += x.square().sum(0)

            return hook

        with self.meter.stage("forward"), torch.no_grad(), _hooked({linears[k]: note(k) for k in linears}):
            for batch in range(len(self.hidden)):
                self.run(block, index, batch)
        with self.exchange():
            self.ranks.add(*squares.values())
        return {name: total.sqrt() for name, total in squares.items()}

    def outputs(self, block: nn.Module, index: int, hidden: Sequence[Tensor] | None = None) -> MutableSequence[Tensor]:
        """What block `index` gives for all windows, without moving on. Default of `hidden`: the walk's own."""
        found = self.store()
        with self.meter.stage("forward"), torch.no_grad():
            for batch, states in enumerate(self.hidden if hidden is None else hidden):
                found.append(self.run(block, index, batch, states))
        return found

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass all windows through block `index`."""
        with self.meter.stage("forward"), torch.no_grad():
            for batch in range(len(self.hidden)):
                self.hidden[batch] = self.run(block, index, batch)
                self._calls[batch][index] = _DONE

    def run(
        self,
        block: nn.Module,
        index: int,
        batch: int,
        hidden: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Block `index` on one batch of the walk's hidden states, or on `hidden`; in `dtype`, if it is given."""
        states = self.hidden[batch] if hidden is None else hidden
        call = self._calls[batch][index]
        if dtype is not None:
            call, states = _cast(call, dtype), states.to(dtype)
        return call.apply(block, states.to(next(block.parameters()).device))

    def _input_of(self, linear: nn.Module, block: nn.Module, index: int, batch: int) -> Tensor | None:
        """The input of `linear` on one batch, or None if that does not reach it; the rest of the block is not run."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(_input(args, kwargs))
            raise _Stop

        with _hooked({linear: hook}), suppress(_Stop):
            self.run(block, index, batch)
        return seen[0] if seen else None


def _united(found: Sequence[list[list[str]]]) -> list[list[str]]:
    """The stages of all processes as one list: those of the first, and what only others reached."""
    placed: set[str] = set()
    united: list[list[str]] = []
    for stages in found:
        for stage in stages:
            fresh = [name for name in stage if name not in placed]
            united += [fresh] if fresh else []
            placed.update(fresh)
    return united


_DONE = _Call((), {}, False)


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record_calls(
    provider: BlockProvider, first: nn.Module, batch: Tensor, output: list[Any]
) -> tuple[Tensor, list[_Call]]:
    """Run the model with blocks that only record how they are called. Returns block 0's input, and the calls.

    `output` holds what block 0 really returns, once it ran: the others return the like of it.
    """
    count = len(provider)
    calls: dict[int, _Call] = {}
    entry: list[Tensor] = []
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
            calls[index] = _Call(args if by_keyword else args[1:], kwargs, by_keyword)
            if index == 0:
                entry.append(hidden)
            if index == count - 1:
                raise _Stop
            if not output:  # shows whether blocks return a tensor, or a tuple that begins with one
                again = {"hidden_states": hidden} if by_keyword else {}
                output.append(run_first(*args, **again, **kwargs))
            return hidden if isinstance(output[0], Tensor) else (hidden, *output[0][1:])

        return forward

    with _forward_replaced([(provider.skeleton(i), stand_in(i)) for i in range(count)]), suppress(_Stop):
        provider.run(batch)
    if len(calls) != count:
        raise ModelError(
            f"the model ran {len(calls)} of its {count} blocks; it cannot be walked block by block, unless "
            "`block_list` names another list"
        )
    return entry[0], [calls[i] for i in range(count)]


@contextmanager
def _forward_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it cast."""
    if isinstance(value, _Call):
        return _Call(_cast(value.args, dtype), _cast(value.kwargs, dtype), value.by_keyword)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _shared(value: Any, pool: dict[tuple, list[Tensor]]) -> Any:
    """`value` with equal tensors made one: every batch brings the same masks and rotary tables."""
    if isinstance(value, _Call):
        return _Call(_shared(value.args, pool), _shared(value.kwargs, pool), value.by_keyword)
    if isinstance(value, dict):
        return {key: _shared(item, pool) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_shared(item, pool) for item in value)
    if isinstance(value, Tensor):
        known = pool.setdefault((value.shape, value.dtype, value.device), [])
        for other in known:
            if other is value or torch.equal(other, value):
                return other
        known.append(value)
    return value
