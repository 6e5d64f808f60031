"""Timing several things in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..measure import finish


@dataclass(frozen=True)
class Seconds:
    """Seconds of repeated runs: the median, and the middle half of them."""

    median: float
    low: float
    high: float


def alternate(
    runs: Sequence[Callable[[], object]], repeats: int, calls: int = 1, devices: Collection[torch.device] = ()
) -> list[Seconds]:
    """Run each of `runs` in turn, `repeats` times after one round to warm up, so that a disturbance meets them all.

    A turn is `calls` calls, and its time that of one of them on average. It ends when `devices` have finished.

    >>> [seconds.low <= seconds.median <= seconds.high for seconds in alternate([lambda: None, lambda: 1], 5)]
    [True, True]
    """
    taken: list[list[float]] = [[] for _ in runs]
    for round_ in range(repeats + 1):
        for run, times in zip(runs, taken, strict=True):
            finish(devices)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            finish(devices)
            if round_:
                times.append((time.perf_counter() - start) / calls)
    return [_summary(times) for times in taken]


def _summary(times: list[float]) -> Seconds:
    if len(times) < 2:
        return Seconds(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Seconds(median, low, high)
