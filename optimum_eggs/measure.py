"""Seconds and peak memory, stage by stage; and the processor they were measured on."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def devices_of(model: torch.nn.Module) -> set[torch.device]:
    """Where the weights of a model are."""
    return {parameter.device for parameter in model.parameters()}


def finish(devices: Iterable[torch.device]) -> None:
    """Wait until each of `devices` has done what it was asked to: a GPU is still at work when a call to it returns."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


class Meter:
    """Measures wall seconds, CPU seconds and peak resident memory of named stages.

    Stages may nest: time spent in an inner stage is not counted for the outer one. Memory is sampled by a thread
    while the meter is open; on CUDA, the allocator's own peak of the whole run is added to the summary, that of the
    device where it is the highest.

    Args:
        devices: Where work is done, besides the CPU. A stage ends when they have finished.
        interval: Seconds between two samples of memory.

    >>> with Meter() as meter:
    ...     with meter.stage("work"):
    ...         _ = sum(range(1000))
    >>> sorted(meter.summary()["stages"])
    ['work']
    """

    def __init__(self, devices: Iterable[torch.device | str] = (), interval: float = 0.01) -> None:
        self._devices = [torch.device(device) for device in devices]
        self._interval = interval
        self._process = psutil.Process()
        self._stack: list[str] = []
        self._wall: dict[str, float] = {}
        self._cpu: dict[str, float] = {}
        self._peak: dict[str, int] = {}
        self._mark = (0.0, 0.0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._begin = self._now()
        self.start_rss = self._process.memory_info().rss
        self._peak_rss = self.start_rss
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._end = self._now()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens within for `name`."""
        self._switch()
        self._stack.append(name)
        self._note_memory()
        try:
            yield
        finally:
            self._note_memory()
            self._switch()
            self._stack.pop()

    def so_far(self) -> tuple[float, int]:
        """Seconds since the meter was opened, and the most resident memory seen since, in bytes."""
        return self._now()[0] - self._begin[0], self._peak_rss

    def summary(self) -> dict:
        """Totals and stages, after the meter is closed. Seconds; bytes."""
        stages = {
            name: {"seconds": self._wall[name], "cpu_seconds": self._cpu[name], "peak_rss": self._peak[name]}
            for name in self._wall
        }
        total = {
            "seconds": self._end[0] - self._begin[0],
            "cpu_seconds": self._end[1] - self._begin[1],
            "rss_before": self.start_rss,
            "peak_rss": self._peak_rss,
            "stages": stages,
        }
        if self._cuda:
            total["peak_cuda"] = max(map(torch.cuda.max_memory_allocated, self._cuda))
        return total

    @property
    def _cuda(self) -> list[torch.device]:
        return [device for device in self._devices if device.type == "cuda"]

    def _now(self) -> tuple[float, float]:
        finish(self._devices)
        return time.perf_counter(), time.process_time()

    def _switch(self) -> None:
        now = self._now()
        if self._stack:
            name = self._stack[-1]
            self._wall[name] = self._wall.get(name, 0.0) + now[0] - self._mark[0]
            self._cpu[name] = self._cpu.get(name, 0.0) + now[1] - self._mark[1]
        self._mark = now

    def _note_memory(self) -> None:
        rss = self._process.memory_info().rss
        self._peak_rss = max(self._peak_rss, rss)
        for name in self._stack[-1:]:
            self._peak[name] = max(self._peak.get(name, 0), rss)

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self._note_memory()
