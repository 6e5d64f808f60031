"""The floor of a layer: as asked for, or the strongest that costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..pattern import NMPattern

CANDIDATES = ((1, 4), (1, 8), (1, 16), (1, 32), (1, 64))
"""(min_degree, band), the strongest first: the share of its outputs that every input keeps is min_degree / band."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Floor:
    """Every input keeps `min_degree` outputs of every `band` rows; 0 is no floor."""

    min_degree: int
    band: int


NO_FLOOR = Floor(0, 1)


def strongest_floor(
    solve: Callable[[Floor], Result], error: Callable[[Result], float], rows: int, pattern: NMPattern, tolerance: float
) -> tuple[Floor, Result, float]:
    """The strongest floor whose error is at most (1 + tolerance) times that without a floor.

    Args:
        solve: Solves the layer under a floor. Called once without one, then once for each floor tried.
        error: The error of a solution.
        rows: Outputs of the layer. A floor whose band is taller, or that the pattern cannot keep, is not tried.
        pattern: n kept of every m inputs.
        tolerance: Share of the error that a floor may add.

    Returns:
        The floor, its solution, and the error without a floor. Where no floor is within the tolerance: none.
    """
    free = solve(NO_FLOOR)
    least = error(free)
    for min_degree, band in CANDIDATES:
        if band <= rows and min_degree * pattern.m <= band * pattern.n:
            floor = Floor(min_degree, band)
            solution = solve(floor)
            if error(solution) <= (1 + tolerance) * least:
                return floor, solution, least
    return NO_FLOOR, free, least
