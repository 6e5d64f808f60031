"""The walk: calibration windows pass through a model block by block, and only one block is needed at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import Meter
from ..nn import dense_weight
from ..nn.dense import reading_fast
from ..ops.wide import widens
from ..ranks import ALONE, Ranks
from .calls import DONE, Call, cast, record_calls, shared
from .handed import Extra, Handed, extras_in, put_back
from .hooks import Stop, hooked, input_of
from .kept import Kept
from .providers import BlockProvider
from .states import states_in_memory
from .statistics import GramAccumulator


@dataclass(frozen=True)
class DenseTwin:
    """A block as it was before it was pruned, a layer of it, and what the dense model hands to it, batch by batch."""

    block: nn.Module
    linear: nn.Module
    hidden: Sequence[Tensor]
    handed: Sequence[Handed]


class Walk:
    """Calibration windows on their way through the blocks.

    At any time it holds the hidden states before one block, and what the model passes to each block besides. That
    may differ from block to block (masks, rotary tables); it is recorded in one pass in which no block computes.

    Args:
        provider: Where the blocks come from.
        batches: Token ids (windows, tokens), batch by batch: windows that run at a time.
        meter: Counts the seconds of `"forward"` and `"statistics"`.
        store: Makes a list to hold hidden states in, of what they take in bytes and the device that computes them.
        ranks: The processes over which the windows of every batch are shared out. Statistics are summed over them, and
            every one of them must ask for the same.

    Attributes:
        hidden: Hidden states before the block at hand, batch by batch, as the pruned blocks before it give them.
        handed: What else these hand to it, batch by batch.
        store: Makes another list of hidden states for as many.

    Raises:
        ModelError: the model does not call each of its blocks once, in order, with the hidden states first.
    """

    def __init__(
        self,
        provider: BlockProvider,
        batches: Sequence[Tensor],
        meter: Meter,
        store: Callable[[int, torch.device], MutableSequence[Tensor]] = states_in_memory,
        ranks: Ranks = ALONE,
    ) -> None:
        self.provider, self.meter, self.ranks = provider, meter, ranks
        batches = [ranks.share(batch) for batch in batches]
        tokens = sum(batch.numel() for batch in batches)
        self._calls: list[list[Call]] = []  # [batch][block]
        self.handed: list[Handed] = []
        self._last: dict[Extra, int] = {}  # the block that reads it last
        pool: dict[tuple, list[Tensor]] = {}
        with meter.stage("forward"), torch.no_grad():
            first = provider.materialise(0)
            output: list[Any] = []
            for batch in batches:
                hidden, handed, calls = record_calls(provider, first, batch, output)
                if not self._calls:
                    self.store = partial(store, hidden.nbytes * tokens // batch.numel(), hidden.device)
                    self.hidden = self.store()
                    self._kept = Kept(self.store)
                self.hidden.append(hidden)
                self.handed.append(handed)
                self._calls.append([call.changed(partial(shared, pool=pool)) for call in calls])
                for index, call in enumerate(calls):
                    self._last |= dict.fromkeys(extras_in((call.args, call.kwargs)), index)
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
                x = input_of(args, kwargs)
                keep_alive.append(x)
                seen.setdefault(name, []).append((x.data_ptr(), x.shape, x.stride(), x.dtype))

            return hook

        with self.meter.stage("forward"), torch.no_grad(), hooked({linears[k]: note(k) for k in linears}):
            self.run(block, index, batch)
        return seen

    def statistics(
        self, block: nn.Module, index: int, linear: nn.Module, dense: DenseTwin | None = None
    ) -> GramAccumulator:
        """The Gram matrix of the inputs of `linear`, one of block `index`, over all windows.

        With `dense`, also the products with the inputs that its layer gets, unless they are not of the same tokens:
        experts may be sent others.
        """
        weight = dense_weight(linear)
        accumulator = GramAccumulator(weight.shape[1], weight.device)
        paired = dense is not None
        with self.meter.stage("forward"), torch.no_grad():
            for batch, hidden in enumerate(self.hidden):
                x = self._input_of(linear, block, index, batch, hidden)
                other = None
                if dense is not None and paired:
                    theirs = dense.hidden[batch], dense.handed[batch]
                    other = self._input_of(dense.linear, dense.block, index, batch, *theirs)
                    tokens = hidden.shape[:-1].numel()
                    paired = all(seen is not None and seen.shape[:-1].numel() == tokens for seen in (x, other))
                if x is not None:
                    with self.meter.stage("statistics"):
                        accumulator.add(x, other if paired else None)
        with self.exchange():
            return accumulator.over_all(self.ranks, paired)

    def statistics_together(
        self, block: nn.Module, index: int, linears: Mapping[str, nn.Module]
    ) -> dict[str, GramAccumulator]:
        """The Gram matrices of the inputs of several linears of block `index`, in one pass over all windows.

        What they read of a batch is held until the block has run, and then added, so that a GPU need not be waited for
        at every one of them.
        """
        weights = {name: dense_weight(linear) for name, linear in linears.items()}
        found = {name: GramAccumulator(weight.shape[1], weight.device) for name, weight in weights.items()}
        seen: list[tuple[str, Tensor]] = []

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: seen.append((name, input_of(args, kwargs)))

        with self.meter.stage("forward"), torch.no_grad(), hooked({linears[k]: note(k) for k in linears}):
            for batch in range(len(self.hidden)):
                self.run(block, index, batch)
                with self.meter.stage("statistics"):
                    for name, x in seen:
                        found[name].add(x)
                    seen.clear()
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
                x = input_of(args, kwargs).flatten(0, -2).to(torch.float32)
                squares[name] += x.square().sum(0)

            return hook

        with self.meter.stage("forward"), torch.no_grad(), hooked({linears[k]: note(k) for k in linears}):
            for batch in range(len(self.hidden)):
                self.run(block, index, batch)
        with self.exchange():
            self.ranks.add(*squares.values())
        return {name: total.sqrt() for name, total in squares.items()}

    def settle(self, block: nn.Module, settled: Collection[nn.Module], others: Collection[nn.Module]) -> None:
        """Let what `settled` parts of a block give stand in for them in passes to come, until [`forget`].

        Until then, `block` must be passed on the same hidden states, and nothing may change that `settled` parts hold.

        Args:
            block: The block at hand, or what it was.
            settled: Children of it.
            others: Children of it that may give something else in the next pass, and what runs behind them too.
        """
        self._kept.settle(block, settled, others)

    def forget(self, block: nn.Module) -> None:
        """Run all of `block` again from now on."""
        self._kept.forget(block)

    def pass_on(
        self, block: nn.Module, index: int, hidden: MutableSequence[Tensor], handed: MutableSequence[Handed]
    ) -> None:
        """Put what block `index` gives for hidden states, and what else it hands on, in their place, batch by batch."""
        pool: dict[tuple, list[Tensor]] = {}
        with self.meter.stage("forward"), torch.no_grad():
            for batch in range(len(hidden)):
                given = handed[batch].copied()
                hidden[batch], extras = self._run(block, index, batch, hidden[batch], given)
                left = given.behind(index, extras, self._last)
                handed[batch] = replace(left, extras=shared(left.extras, pool))

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass all windows through block `index`."""
        self.pass_on(block, index, self.hidden, self.handed)
        for calls in self._calls:
            calls[index] = DONE

    def run(
        self,
        block: nn.Module,
        index: int,
        batch: int,
        hidden: Tensor | None = None,
        dtype: torch.dtype | None = None,
        handed: Handed | None = None,
    ) -> Tensor:
        """Block `index` on one batch of the walk's hidden states, or on `hidden`; in `dtype`, if it is given.

        What the walk hands to it besides, or `handed`, stays as it is.
        """
        states = self.hidden[batch] if hidden is None else hidden
        return self._run(block, index, batch, states, (handed or self.handed[batch]).copied(), dtype)[0]

    def _run(
        self,
        block: nn.Module,
        index: int,
        batch: int,
        states: Tensor,
        handed: Handed,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What block `index` gives, which may write in what is `handed` to it."""
        call = self._calls[batch][index].changed(partial(put_back, handed=handed))
        if dtype is not None:
            call, states = call.changed(partial(cast, dtype=dtype)), states.to(dtype)
        states = states.to(next(block.parameters()).device)
        fast = reading_fast(block) if widens(states.dtype, states.device.type) else nullcontext()
        with fast, self._kept.standing_in(block, batch, states.nbytes):
            return call.apply(block, states)

    def _input_of(
        self,
        linear: nn.Module,
        block: nn.Module,
        index: int,
        batch: int,
        hidden: Tensor,
        handed: Handed | None = None,
    ) -> Tensor | None:
        """The input of `linear` on one batch, or None if that does not reach it; the rest of the block is not run."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(input_of(args, kwargs))
            raise Stop

        with hooked({linear: hook}), suppress(Stop):
            self.run(block, index, batch, hidden, handed=handed)
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
