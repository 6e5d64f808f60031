"""One block: its layers pruned in the order in which they run, tuned together, and packed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration import GramAccumulator, Walk
from ..config import EGGSConfig
from ..errors import NumericalError
from ..importance import importance_score
from ..masks import Shortfall, shortfall, topn_mask
from ..masks.certificate import Certificate, certify
from ..measure import Meter
from ..nn import NMLinear, dense_weight
from ..nn.experts import SplitExperts
from ..packing import pack_mask, unpack_mask
from ..pattern import NMPattern
from ..update import relative_error
from .fold import find_folds, permute_block
from .inputs import LayersAlike, check_finite, layers_with_inputs
from .plan import PrunePlan
from .precision import in_float32
from .report import DenseLayer, LayerReport
from .solve import solve_layer
from .tune import BlockTuning, tune_block

logger = logging.getLogger(__name__)


@dataclass
class BlockResult:
    """What became of a block."""

    layers: list[LayerReport]
    tuning: BlockTuning | None = None
    left_dense: list[DenseLayer] = field(default_factory=list)


@dataclass
class _Solved:
    """What is known of a layer that is pruned but not packed yet: its module holds the dense weight, zeros in place."""

    name: str
    in_features: int
    pattern: NMPattern
    mask_bits: Tensor
    min_degree: int
    band: int
    relative_error: float
    tokens: int
    permutation_gain: float | None
    scores_alone: Shortfall | None
    weights_alone: bool
    damping: float | None

    def mask(self) -> Tensor:
        return unpack_mask(self.mask_bits, self.in_features)


class DenseStream:
    """The hidden states of the dense model, block by block, beside those of the pruned one."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.hidden = walk, walk.store()
        self.hidden.extend(walk.hidden)

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass through block `index`, which must still be dense."""
        self.hidden = self.walk.outputs(block, index, self.hidden)


def prune_block(
    walk: Walk,
    block: nn.Module,
    index: int,
    plan: PrunePlan,
    config: EGGSConfig,
    meter: Meter,
    stream: DenseStream | None,
    go_on: bool = True,
) -> BlockResult:
    """Prune block `index` in place and, with `go_on`, pass the walk and the dense stream through it."""
    todo, plan.layers[index] = plan.layers[index], {}  # the plan must not keep the dense layers in memory
    prefix = f"{plan.block_list.block_name(index)}."
    if stream is not None and (todo or go_on):
        stream.advance(block, index)
    gains = _permute(walk, block, index, prefix, todo, config, meter)
    solved: list[_Solved] = []
    for wave in layers_with_inputs(walk, block, index, prefix, todo, config.min_expert_tokens):
        solved += _prune_wave(walk, wave, todo, gains, config)

    tuning = None
    if stream is not None and solved:
        with meter.stage("tuning"):
            masks = {todo[layer.name]: layer.mask() for layer in solved}
            steps, rate = config.block_tuning, config.tuning_lr
            tuning = tune_block(walk, block, index, masks, stream.hidden, steps, rate, config.seed)
    if go_on:
        walk.advance(block, index)

    left_dense = []
    reached = {layer.name for layer in solved}
    for name in (name for name in todo if name not in reached):
        reason = "not reached by the calibration text, or run more than once in its block"
        left_dense.append(DenseLayer(name, reason, dense_weight(todo[name]).numel()))
        logger.warning("%s: left dense: %s", name, reason)
    layers = _pack(walk, solved, block, prefix, index)
    for module in block.modules():
        if isinstance(module, SplitExperts):
            module.own_memory()
    return BlockResult(layers, tuning, left_dense)


def _permute(
    walk: Walk,
    block: nn.Module,
    index: int,
    prefix: str,
    todo: dict[str, nn.Module],
    config: EGGSConfig,
    meter: Meter,
) -> dict[str, float]:
    """Fold better orders of the channels into the dense block; the gain in kept score, by layer."""
    folds = find_folds(block, prefix, todo) if config.permutation else []
    if not folds:
        return {}
    norms = walk.input_norms(block, index, {fold.consumer: todo[fold.consumer] for fold in folds})
    for name, norm in norms.items():
        check_finite(name, bool(torch.isfinite(norm).all()))

    def score(name: str) -> Tensor:
        weight = dense_weight(todo[name]).to(torch.float32)
        return importance_score(config.importance, weight, norms[name], config.exponent)

    # In float32, where a fold that is wrong by little shows.
    run = partial(walk.run, block, index, 0, dtype=torch.float32)
    with meter.stage("permutation"):
        gains: dict[str, float] = {}
        with walk.ranks.together():
            if walk.ranks.first:  # a fold is checked on the windows at hand, so one process decides
                with in_float32(block):
                    gains = permute_block(block, prefix, folds, score, config.pattern, run)
        walk.ranks.copy_from(0, *(parameter.data for parameter in block.parameters()))
        return walk.ranks.gather(gains)[0]


def _prune_wave(
    walk: Walk,
    wave: Sequence[LayersAlike],
    todo: Mapping[str, nn.Module],
    gains: Mapping[str, float],
    config: EGGSConfig,
) -> list[_Solved]:
    """Prune layers that do not hang on one another, shared out over the processes."""
    ranks = walk.ranks
    alike = {name: layers for layers in wave for name in layers.names}
    owners = ranks.deal({name: dense_weight(todo[name]).numel() for name in alike})
    solved: dict[str, _Solved] = {}
    with ranks.together():
        for name in alike:
            if owners[name] == ranks.rank:
                module, gain = todo[name], gains.get(name)
                solved[name] = _prune_layer(name, module, alike[name], config, walk.meter, gain)
    with walk.exchange():
        for name in alike:
            ranks.copy_from(owners[name], dense_weight(todo[name]))
        solved = ranks.merge(solved)
    return [solved[name] for name in alike]


def _prune_layer(
    name: str,
    module: nn.Module,
    alike: LayersAlike,
    config: EGGSConfig,
    meter: Meter,
    permutation_gain: float | None,
) -> _Solved:
    stored, statistics, pattern = dense_weight(module), alike.statistics, config.pattern
    weight = stored.to(torch.float32)
    found = solve_layer(name, weight, statistics.gram, config, meter)
    with meter.stage("update"):
        pruned = found.weight.to(stored.dtype)
        if not bool(torch.isfinite(pruned).all()):
            raise NumericalError(
                f"{name}: the update gave NaN or infinite weights in {stored.dtype}; raise `damping`, or load the "
                "model in a wider dtype"
            )
    with meter.stage("report"):
        error = relative_error(weight, pruned.to(torch.float32), statistics.gram)
        scores_alone = _scores_alone(weight, statistics, config)
    # Written in place, so that the rest of the block runs on it; packed when the block is done.
    stored.copy_(pruned)
    return _Solved(
        name,
        weight.shape[1],
        pattern,
        pack_mask(found.mask).cpu(),
        config.min_degree,
        config.band,
        error,
        statistics.tokens,
        permutation_gain,
        scores_alone,
        alike.weights_alone,
        found.damping,
    )


def _scores_alone(weight: Tensor, statistics: GramAccumulator, config: EGGSConfig) -> Shortfall | None:
    """What the largest scores alone would have lacked of the layer's floor."""
    if not config.min_degree:
        return None
    score = importance_score(config.importance, weight, statistics.input_norm, config.exponent)
    return shortfall(topn_mask(score, config.pattern), config.pattern, config.min_degree, config.band)


def _pack(walk: Walk, solved: Sequence[_Solved], block: nn.Module, prefix: str, index: int) -> list[LayerReport]:
    """Put packed layers in place of the dense ones. The certificates are shared out over the processes."""
    meter, ranks = walk.meter, walk.ranks
    mine = set(ranks.mine({layer.name: len(layer.mask_bits) * layer.in_features for layer in solved}))
    certificates: dict[str, Certificate] = {}
    for layer in solved:
        path = layer.name.removeprefix(prefix)
        with meter.stage("pack"):
            module = block.get_submodule(path)
            mask = layer.mask().to(dense_weight(module).device)
            block.set_submodule(path, NMLinear.from_linear(module, layer.pattern, mask))
            del module  # so that its memory is free
        with meter.stage("report"):
            if layer.name in mine:
                extra = (layer.band,) if layer.min_degree else ()
                certificates[layer.name] = certify(mask, layer.pattern, extra_bands=extra)
    with walk.exchange():
        certificates = ranks.merge(certificates)
    return [_report(layer, index, certificates[layer.name]) for layer in solved]


def _report(layer: _Solved, index: int, certificate: Certificate) -> LayerReport:
    return LayerReport(
        layer.name,
        index,
        len(layer.mask_bits),
        layer.in_features,
        str(layer.pattern),
        layer.relative_error,
        layer.tokens,
        certificate,
        layer.min_degree,
        layer.band,
        layer.permutation_gain,
        layer.scores_alone,
        layer.weights_alone,
        layer.damping,
    )
