"""Turning a dense model into the basis in which pruning loses least, before it is pruned."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import BlockProvider, Walk
from ..config import EGGSConfig
from ..errors import ModelError, NumericalError
from ..measure import Meter
from ..nn import dense_weight
from ..ranks import ALONE, Ranks
from ..update import Problem
from .estimate import turning_announcement, turning_seconds
from .fold import Fold, same_output
from .inputs import check_finite
from .plan import PrunePlan
from .precision import in_float32
from .residual import (
    BlockParts,
    OutsideParts,
    check_turns,
    find_block_parts,
    find_outside_parts,
    fold_block,
    fold_outside,
    turned_outside,
    value_rows,
)
from .rotation import STEPS, BlockSample, HeadSample, ReaderSample, Rotation, WriterSample, learn_rotation
from .solve import raised_damping

logger = logging.getLogger(__name__)

_ROWS = 1.0  # of a layer, or columns, by the width of the stream: the most that the rotation is chosen by


@dataclass(frozen=True)
class Turn:
    """How a model is turned: what of it touches the stream, by what, and the gains (d,) of its last norm, float64."""

    blocks: list[BlockParts]
    outside: OutsideParts
    rotation: Rotation
    gains: Tensor

    def fold_block(self, block: nn.Module, index: int) -> None:
        """Turn dense block `index` in place."""
        device = next(block.parameters()).device
        values = [turn.to(device) for turn in self.rotation.values[index]]
        fold_block(block, self.blocks[index], self.rotation.residual.to(device), values)

    def fold_outside(self, model: Any) -> None:
        """Turn what lies outside the blocks in place."""
        device = model.get_submodule(self.outside.embedding).weight.device
        fold_outside(model, self.outside, self.rotation.residual.to(device), self.gains.to(device))

    def outside_weight(self, name: str, value: Tensor) -> Tensor:
        """A weight outside the blocks, by dotted name, in the new basis."""
        residual, gains = (matrix.to(value.device) for matrix in (self.rotation.residual, self.gains))
        return turned_outside(self.outside, name, value, residual, gains)

    @property
    def matrix_norms(self) -> list[str] | None:
        """What is a `MatrixNorm` afterwards, by dotted name."""
        return None if self.outside.head is not None else [self.outside.norm]

    @property
    def lost(self) -> dict[str, float]:
        """As in the report."""
        return {"lost_before": self.rotation.lost_before, "lost_after": self.rotation.lost_after}


@torch.no_grad()
def choose_turn(
    model: Any,
    blocks: BlockProvider,
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    store: Callable[[int, torch.device], MutableSequence[Tensor]],
    ranks: Ranks = ALONE,
    progress: bool | None = None,
) -> Turn | str:
    """Pass the windows through the dense model, and choose the rotation by what its layers read.

    Memory: (d, d) float32 for each norm of the stream, d its width; as much of each layer to be pruned, in its dtype,
    which the rotation is chosen by; and what the Gram matrices of a block take.

    Returns:
        How it is turned; with `rotation="auto"`, the reason why it cannot be.

    Raises:
        ModelError: it cannot be, and `rotation` is True; the message says why.
    """
    try:
        return _choose(model, blocks, plan, config, windows, meter, store, ranks, progress)
    except _CannotTurnError as error:
        if config.rotation is True:
            raise ModelError(f"rotation=True: {error}; prune it with rotation=False, or 'auto'") from error
        logger.warning("rotation='auto' leaves the model in its basis: %s", error)
        return str(error)


class _CannotTurnError(ModelError):
    """A model is built in a way that cannot be turned."""


def _choose(
    model: Any,
    blocks: BlockProvider,
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    store: Callable[[int, torch.device], MutableSequence[Tensor]],
    ranks: Ranks,
    progress: bool | None,
) -> Turn:
    with _refusing(type(model).__name__):
        outside = find_outside_parts(model, plan.block_list)
        given: list[Tensor] = []
        norm = model.get_submodule(outside.norm)

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:  # while what is outside the blocks is there
            given[:] = given or [output.clone(), norm.get_parameter("weight").to(torch.float64, copy=True)]

        handle = model.get_submodule(outside.embedding).register_forward_hook(note)
        try:
            walk = Walk(blocks, windows.split(config.batch_size), meter, store, ranks)
        finally:
            handle.remove()
        if not given:
            raise ModelError(f"{outside.embedding} is not called with token ids")
        entered, gains = given
        with ranks.together():
            _check_entry(entered, walk.hidden[0])
        del entered
        given.clear()
    size, began = walk.hidden[0].shape[-1], time.perf_counter()
    parts: list[BlockParts] = []
    samples: list[BlockSample] = []
    hide = ranks.hide_bar(progress)
    for index in tqdm(range(len(blocks)), desc="Reading the dense model", unit="block", disable=hide):
        block, prefix = blocks.materialise(index), f"{plan.block_list.block_name(index)}."
        try:
            with ranks.together(), _refusing(f"{type(model).__name__}: block {index}"), in_float32(block):
                found = _parts_of(walk, block, index, [name.removeprefix(prefix) for name in plan.layers[index]])
            parts.append(found)
            sample = _sample(walk, block, index, found, plan, config)
            if index == 0 and progress is not False and ranks.first:
                seconds = turning_seconds(time.perf_counter() - began, sample, size, len(blocks))
                tqdm.write(turning_announcement(seconds), file=sys.stderr)
            if index + 1 < len(blocks):
                walk.advance(block, index)
        finally:
            blocks.release(index)
        if ranks.first:
            samples.append(sample.to(walk.hidden[0].device))
    with meter.stage("rotation"), tqdm(total=STEPS, desc="Choosing the rotation", unit="step", disable=hide) as bar:

        def step_done(loss: float) -> None:
            bar.update()
            bar.set_postfix(lost=f"{loss:.4f}")

        rotation = None
        with ranks.together():
            if ranks.first:
                rotation = learn_rotation(samples, size, config.pattern, step_done=step_done)
        (rotation, *_) = ranks.gather(rotation)
    assert rotation is not None
    return Turn(parts, outside, rotation, gains.cpu())


def _parts_of(walk: Walk, block: nn.Module, index: int, pruned: Collection[str]) -> BlockParts:
    """Of a dense block; heads are turned where both of their layers are to be pruned."""
    hidden = walk.hidden[0].to(next(block.parameters()).device, torch.float32)
    found = find_block_parts(block, hidden.shape[-1], lambda: walk.run(block, index, 0, dtype=torch.float32))
    heads = tuple(fold for fold in found.heads if {fold.consumer, fold.producers[0].name} <= set(pruned))
    found = replace(found, heads=heads)
    check_turns(block, found, hidden, lambda turned, states: walk.run(turned, index, 0, states, torch.float32))
    return found


def _sample(
    walk: Walk, block: nn.Module, index: int, parts: BlockParts, plan: PrunePlan, config: EGGSConfig
) -> BlockSample:
    """What the rotation is chosen by of a block: of the layers that are to be pruned."""
    prefix = f"{plan.block_list.block_name(index)}."
    pruned = {name.removeprefix(prefix): linear for name, linear in plan.layers[index].items()}
    groups = [[name for name in readers.linears if name in pruned] for readers in parts.readers]
    writers = [name for name in parts.writers if name in pruned]
    read = [*(group[0] for group in groups if group), *writers]
    statistics = walk.statistics_together(block, index, {name: pruned[name] for name in read})
    for name in read:
        check_finite(prefix + name, statistics[name].is_finite())
    drawn = torch.Generator().manual_seed((config.seed * 10_007 + index) % 2**63)
    with walk.meter.stage("rotation"):
        gains = {
            name: block.get_submodule(readers.norm).get_parameter("weight").detach().float()
            for readers in parts.readers
            for name in readers.linears
        }
        readers = []
        for group in filter(None, groups):
            factor = _inverse_factor(statistics.pop(group[0]).gram, config, gains[group[0]])
            chosen = [_some_rows(name, dense_weight(pruned[name]), parts.heads, drawn) for name in group]
            readers.append(ReaderSample(gains[group[0]], factor.T @ factor, [rows for rows in chosen if len(rows)]))
        factors = {name: _inverse_factor(statistics.pop(name).gram, config) for name in writers}
        heads = []
        for fold in parts.heads:
            producer, shape = fold.producers[0].name, (fold.heads, fold.copies, fold.size)
            place = next(place for place, group in enumerate(filter(None, groups)) if producer in group)
            weight = dense_weight(pruned[producer])
            values = torch.stack([weight[rows] for rows in value_rows(fold)])
            outputs = dense_weight(pruned[fold.consumer]).unflatten(1, shape)
            own = torch.stack([part.T @ part for part in factors.pop(fold.consumer).split(fold.size, 1)])
            heads.append(HeadSample(place, values, outputs, own.unflatten(0, shape[:2])))
        others = [_some_columns(dense_weight(pruned[name]), factor, config, drawn) for name, factor in factors.items()]
        return BlockSample(readers, others, heads)


def _inverse_factor(gram: Tensor, config: EGGSConfig, gains: Tensor | None = None) -> Tensor:
    """U (in, in), UᵀU = H⁻¹, of inputs without the gains that they have been multiplied by.

    Where H cannot be factorised, its damping is raised tenfold.

    Raises:
        NumericalError: a damping of 1 is not enough either.
    """
    if gains is not None:
        without = torch.where(gains == 0, 0, 1 / gains)
        gram = gram * without * without[:, None]
    problem = Problem(gram, config.damping)
    while True:
        try:
            return problem.inverse_factor
        except NumericalError:
            if problem.damping >= 1:
                raise
            problem = Problem(gram, raised_damping(problem.damping))


def _some_rows(name: str, weight: Tensor, heads: Sequence[Fold], drawn: torch.Generator) -> Tensor:
    """Some rows of a layer, none of values."""
    others = torch.ones(len(weight), dtype=torch.bool)
    for fold in heads:
        for part in value_rows(fold) if fold.producers[0].name == name else ():
            others[part] = False
    places = others.nonzero().flatten()
    chosen = places[torch.randperm(len(places), generator=drawn)[: round(_ROWS * weight.shape[1])]]
    return weight[chosen.to(weight.device)]


def _some_columns(weight: Tensor, factor: Tensor, config: EGGSConfig, drawn: torch.Generator) -> WriterSample:
    """Some columns of a layer that writes the stream, in whole groups of m."""
    groups = weight.shape[1] // config.m
    chosen = torch.randperm(groups, generator=drawn)[: round(_ROWS * len(weight) / config.m)].to(weight.device)
    by_group = weight.unflatten(1, (groups, config.m))[:, chosen]
    diagonal = factor.square().sum(0).unflatten(0, (groups, config.m))[chosen]
    return WriterSample(by_group.flatten(1), diagonal.flatten())


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise _CannotTurnError(f"{what}: {error}") from error


def turn_model(model: Any, plan: PrunePlan, turn: Turn) -> None:
    """Turn a model in memory in place."""
    for index, block in enumerate(plan.block_list.blocks):
        turn.fold_block(block, index)
    turn.fold_outside(model)


def _check_entry(given: Tensor, hidden: Tensor) -> None:
    """Raise unless blocks begin with a multiple of the embeddings: what is added to them would have to be turned too.

    given, hidden (windows, tokens, d): the embeddings, and what the first block gets.
    """
    wide = given.float()
    factor = (hidden.float() * wide).sum() / wide.square().sum() if hidden.shape == given.shape else 1.0
    if not same_output((wide * factor).to(hidden.dtype), hidden):
        raise ModelError("more than the embeddings goes into the first block")
