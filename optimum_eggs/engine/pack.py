"""Packing a dense model that is N:M already, as it is: no value changes, and no calibration text is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import EGGSConfig
from ..errors import ModelError
from ..masks import nonzero_mask, tightest_pattern
from ..masks.certificate import certify
from ..masks.recognise import USUAL, follows
from ..measure import Meter
from ..memory import enough_memory
from ..nn import NMLinear, dense_weight
from ..nn.experts import SplitExperts, join_experts
from ..pattern import NMPattern
from .plan import PrunePlan, as_fused, make_plan
from .report import DenseLayer, LayerReport, PruneReport
from .run import base_model

UNKNOWN = "unknown"
"""What stands for the importance score in the configuration of such a model: the mask came from elsewhere."""


@torch.no_grad()
@enough_memory(remedy="use a machine that has more")
def pack_model(
    model: nn.Module,
    pattern: NMPattern | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = ("lm_head",),
    block_list: str | None = None,
    progress: bool | None = None,
) -> PruneReport:
    """Pack `model` in place: the linear layers in its blocks that are N:M already become [`NMLinear`].

    Args:
        model: A model in memory, on any device, with the zeros that some method has put into it.
        pattern: What to pack. Default: each layer's tightest pattern among the usual ones,
            `optimum_eggs.masks.recognise.USUAL`. A group may have fewer than n nonzeros.
        targets: Name patterns of the layers to look at. Default: all in the blocks.
        ignore: Name patterns of layers to leave dense.
        block_list: Name of the list of blocks, if it cannot be found by structure.
        progress: Show a progress bar. Default: if stderr is a terminal.

    Returns:
        The report: certificates, and every layer that was left dense, with the reason. Its configuration states the
        pattern that most weights have, and each layer's own; how the zeros came about is not known.

    Raises:
        ConfigError: a name pattern matches nothing.
        ModelError: no layer is N:M, the model has no list of blocks or is packed already. It is as it was.
        NumericalError: a weight is NaN or infinite. It is as it was.
    """
    asked = EGGSConfig(pattern, preset="magnitude", targets=targets, ignore=ignore, block_list=block_list)
    with Meter() as meter:
        plan = make_plan(model, asked, fitting=False)
        try:
            with meter.stage("recognise"):
                patterns = _recognise(plan, pattern)
        except BaseException:
            join_experts(model)
            raise
        layers = []
        quiet = None if progress is None else not progress
        for index, block in enumerate(tqdm(plan.layers, "Packing", unit="block", disable=quiet)):
            names, plan.layers[index] = list(block), {}  # the plan must not keep the dense layers in memory
            del block
            layers += [_pack(model, name, index, patterns[name], meter) for name in names if name in patterns]
    left_dense = plan.left_dense
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    if any(isinstance(part, NMLinear) for module in split.values() for part in module.modules()):
        for module in split.values():
            module.own_memory()
    else:
        join_experts(model)
        left_dense = as_fused(left_dense, split)
    weights: Counter[NMPattern] = Counter()
    for layer in layers:
        weights[patterns[layer.name]] += layer.out_features * layer.in_features
    ((most, _),) = weights.most_common(1)
    fields = asked.to_dict() | {
        "n": most.n,
        "m": most.m,
        "preset": None,
        "importance": UNKNOWN,
        "pruned_modules": {layer.name: layer.pattern for layer in layers},
    }
    return PruneReport(
        EGGSConfig.from_dict(fields).to_dict(), layers, left_dense, {}, [], meter.summary(), base_model(model)
    )


def _recognise(plan: PrunePlan, asked: NMPattern | None) -> dict[str, NMPattern]:
    """The pattern of every layer that has one; the others are put down as left dense.

    Raises:
        ModelError: none has.
    """
    found: dict[str, NMPattern] = {}
    for layers in plan.layers:
        for name, module in layers.items():
            weight = dense_weight(module)
            pattern = tightest_pattern(weight) if asked is None else asked if follows(weight, asked) else None
            if pattern is not None:
                found[name] = pattern
            else:
                reason = f"its zeros do not follow {asked or 'any usual N:M pattern'}"
                plan.left_dense.append(DenseLayer(name, reason, weight.numel()))
    if not found:
        tried = str(asked) if asked is not None else f"one of {', '.join(map(str, USUAL))}"
        raise ModelError(
            f"no layer of the {sum(map(len, plan.layers))} looked at is {tried}; name another pattern, or prune the "
            "model: `optimum-cli eggs prune`, or EGGSPruner.prune()"
        )
    return found


def _pack(model: nn.Module, name: str, index: int, pattern: NMPattern, meter: Meter) -> LayerReport:
    module = model.get_submodule(name)
    weight = dense_weight(module)
    with meter.stage("pack"):
        mask = nonzero_mask(weight, pattern)
        model.set_submodule(name, NMLinear.from_linear(module, pattern, mask))
    with meter.stage("report"):
        return LayerReport(
            name,
            index,
            weight.shape[0],
            weight.shape[1],
            str(pattern),
            None,
            None,
            certify(mask, pattern),
            zeros_kept=int(mask.sum() - weight.count_nonzero()),
        )
