"""The layers of a block with the statistics of their inputs, in the order in which they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration import DenseTwin, GramAccumulator, Walk
from ..calibration.states import free_bytes
from ..errors import NumericalError
from ..nn import dense_weight, is_dense_linear
from ..nn.experts import SplitExperts

logger = logging.getLogger(__name__)

_ON_CPU = 2**30  # bytes
_SHARE = 4  # of a GPU's free memory, one part is taken


@dataclass(frozen=True)
class LayersAlike:
    """Layers that read the same tensor, and its statistics.

    `expert`: of an expert, which not all tokens reach; `weights_alone`: too few do, so that the statistics say nothing.
    """

    names: list[str]
    statistics: GramAccumulator
    expert: bool = False
    weights_alone: bool = False


def layers_with_inputs(
    walk: Walk,
    block: nn.Module,
    index: int,
    prefix: str,
    todo: Mapping[str, nn.Module],
    min_expert_tokens: int,
    dense: Callable[[str], DenseTwin | None] = lambda name: None,
    last: Callable[[], None] = lambda: None,
) -> Iterator[list[LayersAlike]]:
    """The layers `todo` of block `index`, with statistics taken once those before them have been dealt with.

    Layers that come together do not hang on one another. Split experts come last, those of the same matrix together.
    Parts of the block whose layers have all been dealt with are settled in `walk`, which is for the caller to forget.

    Args:
        walk: Where the hidden states come from.
        block: The block.
        index: Its index.
        prefix: Its full dotted name, with a dot at the end.
        todo: The layers, by full dotted name.
        min_expert_tokens: Tokens that an expert must see; one that sees fewer is pruned by its weights alone.
        dense: The layer in the dense model, by full dotted name, where its inputs are wanted beside those here.
        last: Called before the last layers are given, when no further statistics will be taken.

    Raises:
        NumericalError: inputs are NaN or infinite.
    """
    limit = min(walk.ranks.gather(wave_bytes(next(block.parameters()).device)))  # all must take the same passes
    waves = expert_waves(block, prefix, todo, limit)
    experts = {name for wave in waves for name in wave}
    others = {name: module for name, module in todo.items() if name not in experts}
    stages = walk.stages(block, index, others) if others else []
    total = len(stages) + len(waves)
    done: set[str] = set()
    for number, stage in enumerate(stages, 1):
        twin = dense(stage[0])
        _settle(walk, block, prefix, todo, done)
        if twin is not None:
            _settle(walk, twin.block, prefix, todo, done)
        statistics = walk.statistics(block, index, todo[stage[0]], twin)
        check_finite(stage[0], statistics.is_finite())
        if twin is not None and statistics.cross is None:
            logger.warning("%s: its error is not corrected: it gets other tokens than in the dense model", stage[0])
        del twin
        if number == total:
            last()
        yield [LayersAlike(stage, statistics)]
        done.update(stage)
    for number, wave in enumerate(waves, len(stages) + 1):
        _settle(walk, block, prefix, todo, done)
        together = walk.statistics_together(block, index, {name: todo[name] for name in wave})
        diagonals = torch.stack([statistics.gram.diagonal() for statistics in together.values()])
        for name, finite in zip(together, torch.isfinite(diagonals).all(1).tolist(), strict=True):
            check_finite(name, finite)
        made: list[LayersAlike] = []
        for name in wave:
            statistics = together.pop(name)
            alone = statistics.tokens < min_expert_tokens
            if alone:
                statistics.forget_inputs()
            made.append(LayersAlike([name], statistics, expert=True, weights_alone=alone))
        del statistics
        if number == total:
            last()
        yield made
        made.clear()  # before the next ones are made
        done.update(wave)


def parts_of(block: nn.Module, prefix: str, todo: Iterable[str]) -> dict[nn.Module, set[str]]:
    """The children of a block that layers `todo` are in, or are, and those, by full dotted name."""
    parts: dict[nn.Module, set[str]] = {}
    for name in todo:
        child, _, _ = name.removeprefix(prefix).partition(".")
        parts.setdefault(block.get_submodule(child), set()).add(name)
    return parts


def kept_parts(block: nn.Module, prefix: str, todo: Iterable[str]) -> int:
    """How many parts of a block are kept at a time, at the most: all that hold layers but the one that runs last."""
    parts = parts_of(block, prefix, todo)
    holding = [part for part in parts if not is_dense_linear(part)]
    return len(holding) - (0 < len(holding) == len(parts))


def _settle(walk: Walk, block: nn.Module, prefix: str, todo: Iterable[str], done: Set[str]) -> None:
    """Settle the parts of the block whose layers `todo` are all done; a layer by itself is none."""
    parts = parts_of(block, prefix, todo)
    settled = [part for part, names in parts.items() if names <= done and not is_dense_linear(part)]
    walk.settle(block, settled, [part for part, names in parts.items() if not names <= done])


def wave_bytes(device: torch.device) -> int:
    """Bytes that the Gram matrices of a wave may take: a quarter of what is free on a GPU, 1 GiB elsewhere."""
    free = free_bytes(device)
    return _ON_CPU if free is None else free // _SHARE


def expert_waves(block: nn.Module, prefix: str, todo: Mapping[str, nn.Module], limit: int) -> list[list[str]]:
    """The layers to prune of a block's split experts, those together whose statistics are taken in one pass.

    What reads the hidden states comes before what reads its outputs. The layers of a wave are as wide as one another,
    and their Gram matrices take `limit` bytes at the most, or are one.
    """
    waves: list[list[str]] = []
    for path, module in block.named_modules():
        for together in module.waves() if isinstance(module, SplitExperts) else []:
            size = limit
            for name in (f"{prefix}{path}.{part}" for part in together):
                if name not in todo:
                    continue
                gram = 4 * dense_weight(todo[name]).shape[1] ** 2
                if size + gram > limit:
                    waves.append([])
                    size = 0
                waves[-1].append(name)
                size += gram
    return waves


def check_finite(name: str, finite: bool) -> None:
    """Raise unless the calibration inputs of the layer called `name` are finite.

    Raises:
        NumericalError: they are not.
    """
    if not finite:
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or infinite values; load the model in a wider dtype (bfloat16 or "
            "float32), or look for the first layer that overflows"
        )
