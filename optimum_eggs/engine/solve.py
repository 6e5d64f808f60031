"""One layer: statistics in, mask and surviving weights out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration import GramAccumulator
from ..config import AUTO, EGGSConfig
from ..errors import NumericalError
from ..importance import importance_score
from ..masks import diagonal_mask, expander_mask, swap_mask, topn_mask
from ..measure import Meter
from ..pattern import NMPattern
from ..update import admm, coordinate_descent, corrected_target, masked_refit, relative_error, sparsegpt
from .floor import NO_FLOOR, Floor, strongest_floor

logger = logging.getLogger(__name__)

_LEAST_DAMPING = 1e-6  # what a damping of 0 is raised to: float32 rounds at 1e-7


@dataclass(frozen=True)
class Solution:
    """A layer solved: mask (out, in), weight (out, in) that is zero off the mask, and the floor that it keeps.

    `target` (out, in) is what the weight was fitted to: the layer's own, or that corrected for changed inputs.
    `error_without_floor` is the relative error that the layer would have without a floor, where that was tried;
    `damping` that which it took, where it had to be raised.
    """

    target: Tensor
    mask: Tensor
    weight: Tensor
    floor: Floor
    error_without_floor: float | None = None
    damping: float | None = None


def solve_layer(
    name: str, weight: Tensor, statistics: GramAccumulator, config: EGGSConfig, pattern: NMPattern, meter: Meter
) -> Solution:
    """Find mask and new weight of the layer called `name`.

    weight (out, in), float32; the statistics of the layer's calibration inputs, float32; both finite. Where the Gram
    matrix cannot be factorised with `config.damping`, or what comes out is not finite, the damping is raised tenfold.

    Raises:
        NumericalError: a damping of 1 is not enough either.
    """
    damping = config.damping
    while True:
        try:
            found = _solve_damped(weight, statistics, config, pattern, damping, meter)
            _check_finite(found.weight, damping)
        except NumericalError as error:
            if damping >= 1:
                raise NumericalError(f"{name}: {error}; add the layer to `ignore`") from error
            raised = min(1.0, max(10 * damping, _LEAST_DAMPING))
            logger.warning("%s: damping is raised from %g to %g: %s", name, damping, raised, error)
            damping = raised
        else:
            return replace(found, damping=damping if damping != config.damping else None)


def _solve_damped(
    weight: Tensor,
    statistics: GramAccumulator,
    config: EGGSConfig,
    pattern: NMPattern,
    damping: float,
    meter: Meter,
) -> Solution:
    gram, target = statistics.gram, weight
    if statistics.cross is not None:
        with meter.stage("update"):
            target = corrected_target(weight, gram, statistics.cross, config.error_correction, damping)

    def solve(floor: Floor) -> tuple[Tensor, Tensor]:
        return _solve(target, gram, config, pattern, floor, damping, meter)

    if config.min_degree != AUTO:
        floor = Floor(int(config.min_degree), config.band) if config.min_degree else NO_FLOOR
        return Solution(target, *solve(floor), floor)
    floor, (mask, values), least = strongest_floor(
        solve, lambda found: relative_error(target, found[1], gram), len(weight), pattern, config.floor_tolerance
    )
    return Solution(target, mask, values, floor, least)


def _check_finite(weight: Tensor, damping: float) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"with damping={damping} the solution holds NaN or infinite values")


def _solve(
    target: Tensor,
    gram: Tensor,
    config: EGGSConfig,
    pattern: NMPattern,
    floor: Floor,
    damping: float,
    meter: Meter,
) -> tuple[Tensor, Tensor]:
    """Mask and values that come near the target (out, in) on the calibration inputs."""

    def allowed(score: Tensor) -> Tensor:
        if config.selection == "diagonal":
            return diagonal_mask(score, pattern, floor.min_degree)
        return expander_mask(score, pattern, floor.min_degree, floor.band)

    if config.solver == "score":
        with meter.stage("mask"):
            score = importance_score(config.importance, target, gram.diagonal().sqrt(), config.exponent)
            mask = topn_mask(score, pattern) if floor == NO_FLOOR else allowed(score)
            if config.swaps:
                mask = swap_mask(target, mask, gram, pattern, floor.min_degree, floor.band, config.swaps)
            values = target * mask
    else:
        with meter.stage("update"):
            if config.solver == "admm":
                mask, values = admm(target, gram, allowed, damping)
            else:
                mask, values = sparsegpt(target, gram, pattern, damping)
    with meter.stage("update"):
        if config.weight_update == "refit":
            values = masked_refit(target, mask, gram, damping, config.refit_steps, values)
        if config.descent_sweeps:
            mask, values = coordinate_descent(
                target,
                values,
                mask,
                gram,
                pattern,
                floor.min_degree,
                floor.band,
                damping,
                config.descent_sweeps,
                config.refit_steps if config.weight_update == "refit" else 0,
            )
    return mask, values
