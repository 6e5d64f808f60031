"""One block whose layers are pruned: the values that stay rounded to codes, and tuned with the rounding in the loop."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..calibration.calls import forward_replaced
from ..config import EGGSConfig
from ..errors import ModelError, NumericalError, ShapeError
from ..measure import Meter
from ..nn import CodedLinear, NMLinear, dense_weight
from ..nn.dense import is_conv1d
from ..packing.codes import Coding, nearest_codes, straight_through
from ..pattern import NMPattern
from ..update import Problem
from ..update.rounding import nearest, round_values, spread
from .error import token_error
from .inputs import layers_with_inputs
from .solve import raised_damping

logger = logging.getLogger(__name__)

_SAME = 1e-3  # of `token_error`, beyond what rounding in half precision does


@dataclass
class RoundedLayer:
    """A pruned layer whose module holds the values that its codes stand for.

    Attributes:
        mask: (out, in), boolean.
        coding: Of the values.
        codes: (out, in), int8, zero off the mask.
        scale: (out, scales), bfloat16.
    """

    mask: Tensor
    coding: Coding
    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """(out, in), float32, zero off the mask."""
        codes = self.codes.to(torch.float32)
        return codes.mul_(spread(self.scale.to(torch.float32), codes.shape[1], self.coding))

    @torch.no_grad()
    def take(self, weight: Tensor, scale: Tensor) -> None:
        """Take the codes of a weight (out, in) and a scale (out, scales), both float32, nearest to it."""
        self.scale = scale.to(torch.bfloat16)
        self.codes = nearest_codes(weight, self.scale.to(torch.float32), self.coding, self.coding.group) * self.mask


def round_block(
    walk: Walk | None,
    block: nn.Module,
    index: int,
    prefix: str,
    layers: Mapping[str, nn.Module],
    masks: Mapping[nn.Module, Tensor],
    config: EGGSConfig,
    meter: Meter,
) -> dict[str, RoundedLayer]:
    """Round the values of pruned layers, in place. Each on inputs that passed those rounded before it.

    Args:
        walk: Where the hidden states before the block come from; not needed to round to the nearest.
        block: The block, dense weights with zeros in place.
        index: Its index.
        prefix: Its full dotted name, with a dot at the end.
        layers: By full dotted name.
        masks: Layer -> mask (out, in).
        config: Its `values`, `value_group` and `rounding`.
        meter: Counts the seconds of `"rounding"`.
    """
    done: dict[str, RoundedLayer] = {}
    if config.rounding != "nearest":
        assert walk is not None
        for wave in layers_with_inputs(walk, block, index, prefix, layers, config.min_expert_tokens):
            for alike in wave:
                problem = Problem(alike.statistics.gram, config.damping)
                for name in alike.names:
                    rows = walk.ranks.rows(len(dense_weight(layers[name])), 1)
                    with walk.ranks.together(), meter.stage("rounding"):
                        own = rows[walk.ranks.rank]
                        rounded = _pass_errors_on(layers[name], masks[layers[name]], problem, config, own)
                    with walk.exchange():
                        for rank, part in enumerate(rows):
                            walk.ranks.copy_from(rank, rounded.codes[part], rounded.scale[part])
                    done[name] = _put(layers[name], rounded)
        walk.forget(block)
    for name, module in layers.items():
        if name not in done:
            if config.rounding != "nearest":
                logger.warning("%s: not reached by the calibration text, so each value is rounded by itself", name)
            with meter.stage("rounding"):
                done[name] = _nearest(module, masks[module], config)
    return done


def _nearest(module: nn.Module, mask: Tensor, config: EGGSConfig) -> RoundedLayer:
    weight = dense_weight(module)
    coding = config.coding(int(mask[0].sum()))
    return _put(module, RoundedLayer(mask.to(weight.device), coding, *nearest(weight.to(torch.float32), coding)))


def _pass_errors_on(module: nn.Module, mask: Tensor, problem: Problem, config: EGGSConfig, own: slice) -> RoundedLayer:
    """Round the values of this process's `own` rows of a layer; all others are zero."""
    weight = dense_weight(module)
    mask, coding = mask.to(weight.device), config.coding(int(mask[0].sum()))
    values = weight[own].to(torch.float32)
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.zeros(len(weight), coding.scales(weight.shape[1]), dtype=torch.bfloat16, device=weight.device)
    while len(values):
        try:
            codes[own], scale[own] = round_values(values, values, mask[own], problem, coding)
            if not bool(torch.isfinite(scale[own]).all()):
                raise NumericalError("a scale of the rounded values is NaN or infinite")
            break
        except NumericalError:
            if problem.damping >= 1:
                raise
            problem = Problem(problem.gram, raised_damping(problem.damping))
    return RoundedLayer(mask, coding, codes, scale)


def code_layer(packed: NMLinear, layer: RoundedLayer) -> CodedLinear:
    """The packed layer of a rounded one, from that with the same mask."""
    kept = layer.codes[layer.mask].view(layer.codes.shape[0], -1)
    return CodedLinear.from_codes(packed, kept, layer.scale, layer.coding)


@torch.no_grad()
def check_runs(
    walk: Walk,
    block: nn.Module,
    index: int,
    prefix: str,
    layers: Mapping[str, RoundedLayer],
    patterns: Mapping[str, NMPattern],
) -> None:
    """Raise unless the block, before it is packed, gives the same with its layers of integers.

    A model may look at the dtype of a layer's weight, and cast what it gives to the layer.

    Raises:
        ModelError: it does not.
    """
    expected, twin = walk.run(block, index, 0), copy.deepcopy(block)
    for name, layer in layers.items():
        path = name.removeprefix(prefix)
        packed = NMLinear.from_linear(twin.get_submodule(path), patterns[name], layer.mask)
        twin.set_submodule(path, code_layer(packed, layer))
    try:
        same = float(token_error(walk.run(twin, index, 0).float(), expected.float())) < _SAME
        why = "it gives something else"
    except ShapeError as error:
        same, why = False, str(error)
    if not same:
        raise ModelError(f"{prefix.rstrip('.')} cannot run with layers of integers: {why}; prune it without `values`")


def _put(module: nn.Module, layer: RoundedLayer) -> RoundedLayer:
    """Put the values of a rounded layer into the module that it is of."""
    weight = dense_weight(module)
    weight.copy_(layer.values())
    return layer


@contextmanager
def rounding_in_the_loop(layers: Mapping[nn.Module, RoundedLayer]) -> Iterator[list[nn.Parameter]]:
    """Have layers compute with the codes nearest to their weights, times scales that are trained too, which are given.

    Their gradients are those of [`straight_through`]. At the end the layers have the codes and scales, and the
    modules their values.
    """
    scales = [nn.Parameter(layer.scale.to(torch.float32)) for layer in layers.values()]
    pairs = zip(layers.items(), scales, strict=True)
    try:
        with forward_replaced([(module, _rounded_forward(module, layer, scale)) for (module, layer), scale in pairs]):
            yield scales
    finally:
        for (module, layer), scale in zip(layers.items(), scales, strict=True):
            layer.take(dense_weight(module).to(torch.float32), scale.detach())
            _put(module, layer)


def _rounded_forward(module: nn.Module, layer: RoundedLayer, scale: Tensor) -> Any:
    turned = is_conv1d(module)

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        weight = straight_through(weight.t() if turned else weight, scale, layer.coding, layer.coding.group)
        return nn.functional.linear(x, weight, module.bias)  # type: ignore[arg-type]

    return forward
