"""One layer: statistics in, mask and surviving weights out."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Solution:
    """A layer solved: mask (out, in), weight (out, in) that is zero off the mask, and the floor that it keeps.

    `target` (out, in) is what the weight was fitted to: the layer's own, or that corrected for changed inputs.
    `error_without_floor` is the relative error that the layer would have without a floor, where that was tried.
    """

    target: Tensor
    mask: Tensor
    weight: Tensor
    floor: Floor
    error_without_floor: float | None = None


def check_finite(name: str, statistics: GramAccumulator) -> None:
    """Raise unless the calibration inputs of the layer called `name` were finite.

    Raises:
        NumericalError: they were not.
    """
    if not statistics.is_finite():
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or infinite values; load the model in a wider dtype (bfloat16 or "
            "float32), or look for the first layer that overflows"
        )


def solve_layer(
    weight: Tensor, statistics: GramAccumulator, config: EGGSConfig, pattern: NMPattern, meter: Meter
) -> Solution:
    """Find mask and new weight of a layer.

    weight (out, in), float32; the statistics of the layer's calibration inputs, float32.
    """
    gram, target = statistics.gram, weight
    if statistics.cross is not None:
        with meter.stage("update"):
            target = corrected_target(weight, gram, statistics.cross, config.error_correction, config.damping)

    def solve(floor: Floor) -> tuple[Tensor, Tensor]:
        return _solve(target, gram, config, pattern, floor, meter)

    if config.min_degree != AUTO:
        floor = Floor(int(config.min_degree), config.band) if config.min_degree else NO_FLOOR
        return Solution(target, *solve(floor), floor)
    floor, (mask, values), least = strongest_floor(
        solve, lambda found: relative_error(target, found[1], gram), len(weight), pattern, config.floor_tolerance
    )
    return Solution(target, mask, values, floor, least)


def _solve(
    target: Tensor, gram: Tensor, config: EGGSConfig, pattern: NMPattern, floor: Floor, meter: Meter
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
                mask, values = admm(target, gram, allowed, config.damping)
            else:
                mask, values = sparsegpt(target, gram, pattern, config.damping)
    with meter.stage("update"):
        if config.weight_update == "refit":
            values = masked_refit(target, mask, gram, config.damping, config.refit_steps, values)
        if config.descent_sweeps:
            mask, values = coordinate_descent(
                target,
                values,
                mask,
                gram,
                pattern,
                floor.min_degree,
                floor.band,
                config.damping,
                config.descent_sweeps,
                config.refit_steps if config.weight_update == "refit" else 0,
            )
    return mask, values
