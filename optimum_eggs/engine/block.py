"""One block: its layers pruned in the order in which they run, tuned together, and packed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calibration import DenseTwin, Walk
from ..config import EGGSConfig
from ..malloc import give_back_freed_memory
from ..masks.certificate import Certificate, certify
from ..measure import Meter
from ..nn import NMLinear, dense_weight
from ..nn.experts import SplitExperts
from ..ranks import ALONE, Ranks
from ..update import Problem
from .inputs import LayersAlike, layers_with_inputs
from .layer import SolvedLayer, prune_layer
from .permute import permute
from .plan import PrunePlan
from .report import DenseLayer, LayerReport
from .rounding import RoundedLayer, check_runs, code_layer, round_block
from .solve import own_rows
from .tune import BlockTuning, tune_block

logger = logging.getLogger(__name__)


@dataclass
class BlockResult:
    """What became of a block; `rounding` is how it was tuned with the rounding of its values in the loop."""

    layers: list[LayerReport]
    tuning: BlockTuning | None = None
    left_dense: list[DenseLayer] = field(default_factory=list)
    rounding: BlockTuning | None = None


class DenseStream:
    """The hidden states of the dense model, block by block, beside those of the pruned one.

    Attributes:
        hidden: Before the block at hand, or behind it once it has been passed.
        handed: What else is handed on there.
        apart: Whether any block before was pruned, so that they are others than the walk's.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk, self.hidden, self.handed, self.apart = walk, walk.store(), list(walk.handed), False
        self.hidden.extend(walk.hidden)

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass through block `index`, which must be dense."""
        self.walk.pass_on(block, index, self.hidden, self.handed)


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
    correcting = bool(config.error_correction and todo)
    if stream is not None and not correcting and (todo or go_on):
        stream.advance(block, index)
    gains = permute(walk, block, index, prefix, todo, config)
    twin = copy.deepcopy(block) if correcting else None
    solved: list[SolvedLayer] = []

    def dense_layer(name: str) -> DenseTwin | None:
        if twin is None or stream is None or not (stream.apart or solved):
            return None
        return DenseTwin(twin, twin.get_submodule(name.removeprefix(prefix)), stream.hidden, stream.handed)

    def statistics_taken() -> None:
        """Let the dense block go, and what was kept of the other if that will be tuned or rounded."""
        nonlocal twin
        if twin is not None:
            if stream is not None and (config.block_tuning or config.rounding_tuning or go_on):
                stream.advance(twin, index)
            walk.forget(twin)
            twin = None  # so that its memory is free
        if config.block_tuning or config.values or not go_on:
            walk.forget(block)

    for wave in layers_with_inputs(
        walk, block, index, prefix, todo, config.min_expert_tokens, dense_layer, statistics_taken
    ):
        solved += _prune_wave(walk, wave, todo, gains, config)
    if not solved:
        statistics_taken()
    if stream is not None:
        stream.apart |= bool(solved)

    tuning = None
    if stream is not None and config.block_tuning and solved:
        with meter.stage("tuning"):
            masks = {todo[layer.name]: layer.mask() for layer in solved}
            steps, rate = config.block_tuning, config.tuning_lr
            tuning = tune_block(walk, block, index, masks, stream.hidden, steps, rate, config.seed)
    rounded: dict[str, RoundedLayer] = {}
    rounding = None
    if config.values:
        layers_of = {layer.name: todo[layer.name] for layer in solved}
        masks = {todo[layer.name]: layer.mask() for layer in solved}
        rounded, rounding = round_layers(walk, block, index, prefix, layers_of, masks, config, meter, stream)
        if rounded and not plan.runs_in_integers:
            with walk.ranks.together():
                check_runs(walk, block, index, prefix, rounded, {layer.name: layer.pattern for layer in solved})
            plan.runs_in_integers = True
    if go_on:
        walk.advance(block, index)
    walk.forget(block)

    left_dense = []
    reached = {layer.name for layer in solved}
    for name in (name for name in todo if name not in reached):
        reason = "not reached by the calibration text, or run more than once in its block"
        left_dense.append(DenseLayer(name, reason, dense_weight(todo[name]).numel()))
        logger.warning("%s: left dense: %s", name, reason)
    layers = _pack(walk, solved, rounded, block, prefix, index)
    for module in block.modules():
        if isinstance(module, SplitExperts):
            module.own_memory()
    return BlockResult(layers, tuning, left_dense, rounding)


def _prune_wave(
    walk: Walk,
    wave: Sequence[LayersAlike],
    todo: Mapping[str, nn.Module],
    gains: Mapping[str, float],
    config: EGGSConfig,
) -> list[SolvedLayer]:
    """Prune layers that do not hang on one another, shared out over the processes.

    Layers that read the same tensor are shared by their rows. Several tensors, as experts have them, are dealt out, or
    the processes would have to meet for every Gram matrix.
    """
    meter, ranks = walk.meter, walk.ranks
    names = [name for layers in wave for name in layers.names]
    owners = ranks.deal({name: dense_weight(todo[name]).numel() for name in names}) if len(wave) > 1 else None
    solved: dict[str, SolvedLayer] = {}
    give_back_freed_memory()  # of the forward passes: most is needed where the widest layer is factorised
    with ranks.together():
        for layers in wave:
            sharing = ranks if owners is None else ALONE
            missing = _missing(layers, todo, config, meter, sharing)
            problem = Problem(layers.statistics.gram, config.damping, sharing)
            for name in layers.names:
                if owners is None or owners[name] == ranks.rank:
                    module, gain, lost = todo[name], gains.get(name), missing.pop(name, None)
                    solved[name] = prune_layer(name, module, layers, problem, config, meter, gain, sharing, lost)
    with walk.exchange():
        for name in names:
            if owners is None:
                solved[name].exchange(dense_weight(todo[name]), ranks)
            else:
                ranks.copy_from(owners[name], dense_weight(todo[name]))
        if owners is not None:
            solved = ranks.merge(solved)
    return [solved[name] for name in names]


def _missing(
    layers: LayersAlike, todo: Mapping[str, nn.Module], config: EGGSConfig, meter: Meter, ranks: Ranks
) -> dict[str, Tensor]:
    """What each layer no longer gives, of this process's own rows, if that is to be corrected.

    For all layers that read the inputs, before the first is pruned: nothing else asks for the products with the dense
    model's inputs, and their memory is free afterwards.
    """
    missing: dict[str, Tensor] = {}
    with meter.stage("update"):
        drift = layers.statistics.take_drift()
        if drift is None:
            return missing
        for name in layers.names:
            weight = dense_weight(todo[name])
            own = own_rows(len(weight), config, ranks)[ranks.rank]
            missing[name] = weight[own].to(torch.float32) @ drift
    return missing


def round_layers(
    walk: Walk | None,
    block: nn.Module,
    index: int,
    prefix: str,
    layers: Mapping[str, nn.Module],
    masks: Mapping[nn.Module, Tensor],
    config: EGGSConfig,
    meter: Meter,
    stream: DenseStream | None,
) -> tuple[dict[str, RoundedLayer], BlockTuning | None]:
    """Round the values of pruned layers in place, and tune the block towards the stream with the rounding in the loop.

    Arguments as of [`round_block`].
    """
    rounded = round_block(walk, block, index, prefix, layers, masks, config, meter)
    if not (config.rounding_tuning and walk is not None and stream is not None and rounded):
        return rounded, None
    with meter.stage("tuning"):
        coded = {layers[name]: layer for name, layer in rounded.items()}
        steps, rate = config.rounding_tuning, config.tuning_lr
        return rounded, tune_block(walk, block, index, masks, stream.hidden, steps, rate, config.seed, coded)


def _pack(
    walk: Walk,
    solved: Sequence[SolvedLayer],
    rounded: Mapping[str, RoundedLayer],
    block: nn.Module,
    prefix: str,
    index: int,
) -> list[LayerReport]:
    """Put packed layers in place of the dense ones. The certificates are shared out over the processes."""
    meter, ranks = walk.meter, walk.ranks
    mine = set(ranks.mine({layer.name: len(layer.mask_bits) * layer.in_features for layer in solved}))
    certificates: dict[str, Certificate] = {}
    for layer in solved:
        path = layer.name.removeprefix(prefix)
        with meter.stage("pack"):
            module = block.get_submodule(path)
            mask = layer.mask().to(dense_weight(module).device)
            packed = NMLinear.from_linear(module, layer.pattern, mask)
            codes = rounded.get(layer.name)
            block.set_submodule(path, packed if codes is None else code_layer(packed, codes))
            del module, packed, codes  # so that their memory is free
        with meter.stage("report"):
            if layer.name in mine:
                extra = (layer.band,) if layer.min_degree else ()
                certificates[layer.name] = certify(mask, layer.pattern, extra_bands=extra)
    with walk.exchange():
        certificates = ranks.merge(certificates)
    codings = {name: str(layer.coding) for name, layer in rounded.items()}
    return [layer.report(index, certificates[layer.name], codings.get(layer.name)) for layer in solved]
