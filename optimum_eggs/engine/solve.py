"""One layer: statistics in, mask and surviving weights out."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EGGSConfig
from ..errors import DistributedError, NumericalError
from ..importance import importance_score
from ..masks import diagonal_mask, expander_mask, swap_mask
from ..measure import Meter
from ..ranks import ALONE, LeftError, Ranks, ToldError
from ..update import Problem, admm, corrected_target, masked_refit, sparsegpt

logger = logging.getLogger(__name__)

_LEAST_DAMPING = 1e-6  # what a damping of 0 is raised to: float32 rounds at 1e-7


@dataclass(frozen=True)
class Solution:
    """Rows of a layer solved: mask (out, in), weight (out, in) that is zero off the mask, what it comes near to.

    `damping` is that which it took, where it had to be raised.
    """

    mask: Tensor
    weight: Tensor
    target: Tensor
    damping: float | None = None


def solve_layer(
    name: str,
    weight: Tensor,
    problem: Problem,
    config: EGGSConfig,
    meter: Meter,
    own: slice = slice(None),
    ranks: Ranks = ALONE,
    missing: Tensor | None = None,
) -> Solution:
    """Find mask and new weight of the layer called `name`, or of the rows of it that are this process's `own`.

    weight (out, in), float32, and the problem of its calibration inputs, both finite; the same in all `ranks`. With
    `missing`, what the own rows no longer give, the configuration's share of it is corrected. Where the Gram matrix
    cannot be factorised with the problem's damping, or what comes out is not finite in any of them, the damping is
    raised tenfold.

    Raises:
        NumericalError: a damping of 1 is not enough either.
    """
    damping = problem.damping
    while True:
        try:
            target = weight[own]
            if missing is not None:
                with meter.stage("update"):
                    target = corrected_target(target, missing, problem, config.error_correction)
            mask, values = _solve(weight, target, problem, config, meter, own, ranks)
            if not bool(torch.isfinite(values).all()):
                raise NumericalError(f"with damping={damping} the solution holds NaN or infinite values")
            ranks.agree(None)
        except (DistributedError, LeftError):
            raise  # there is no trying again
        except ToldError as told:
            error = told.error
        except Exception as found:  # whatever it is, the others must not wait for ever
            ranks.tell(found)
            error = found
        else:
            return Solution(mask, values, target, damping if damping != config.damping else None)
        if not isinstance(error, NumericalError):
            raise error
        if damping >= 1:
            raise NumericalError(f"{name}: {error}; add the layer to `ignore`") from error
        raised = raised_damping(damping)
        logger.warning("%s: damping is raised from %g to %g: %s", name, damping, raised, error)
        damping = raised
        problem = Problem(problem.gram, raised, ranks)


def raised_damping(damping: float) -> float:
    """What is tried next where a Gram matrix cannot be factorised.

    >>> raised_damping(0.01), raised_damping(0), raised_damping(0.5)
    (0.1, 1e-06, 1.0)
    """
    return min(1.0, max(10 * damping, _LEAST_DAMPING))


def own_rows(rows: int, config: EGGSConfig, ranks: Ranks) -> list[slice]:
    """The rows of a layer that each process solves: whole bands, and tiles."""
    together = math.lcm(config.band, config.pattern.m) if config.selection == "diagonal" else config.band
    return ranks.rows(rows, together)


def _solve(
    weight: Tensor, target: Tensor, problem: Problem, config: EGGSConfig, meter: Meter, own: slice, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Mask and values of the `own` rows that come near their target on the calibration inputs.

    Scores are those of the weight (out, in), whose sums go over all rows.
    """
    pattern = config.pattern

    def allowed(score: Tensor) -> Tensor:
        if config.selection == "diagonal":
            return diagonal_mask(score, pattern, config.min_degree)
        return expander_mask(score, pattern, config.min_degree, config.band)

    if config.solver == "score":
        with meter.stage("mask"):
            score = importance_score(config.importance, weight, problem.gram.diagonal().sqrt(), config.exponent)
            mask = allowed(score[own])
            if config.swaps:
                mask = swap_mask(target, mask, problem.gram, pattern, config.min_degree, config.band, config.swaps)
            values = target * mask
    else:
        with meter.stage("update"):
            if config.solver == "admm":
                mask, values = admm(target, problem, allowed, total=lambda count: sum(ranks.agree(count)))
            else:
                mask, values = sparsegpt(target, problem, pattern, choose=allowed)
    if config.weight_update == "refit":
        with meter.stage("update"):
            values = masked_refit(target, mask, problem, config.refit_steps, values)
    return mask, values
