import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from optimum_eggs import measure
from optimum_eggs.measure import Meter


@pytest.fixture
def clock(monkeypatch):
    """Clocks that stand still unless they are moved."""
    now = SimpleNamespace(wall=100.0, cpu=50.0)
    fake = SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.cpu)
    monkeypatch.setattr(measure, "time", fake)
    return now


def seconds(meter):
    return {name: stage["seconds"] for name, stage in meter.summary()["stages"].items()}


def test_an_inner_stage_is_not_counted_for_the_outer_one(clock):
    with Meter() as meter, meter.stage("outer"):
        clock.wall += 1
        with meter.stage("inner"):
            clock.wall += 10
        clock.wall += 2
    assert seconds(meter) == {"outer": 3, "inner": 10}


def test_a_stage_entered_again_adds_up(clock):
    with Meter() as meter:
        for step in (1, 2):
            with meter.stage("work"):
                clock.wall += step
    assert seconds(meter) == {"work": 3}


def test_time_outside_of_stages_is_in_the_total_alone(clock):
    with Meter() as meter:
        clock.wall += 5
        with meter.stage("work"):
            clock.wall += 1
    assert meter.summary()["seconds"] == 6
    assert seconds(meter) == {"work": 1}


def test_cpu_seconds_have_a_clock_of_their_own(clock):
    with Meter() as meter, meter.stage("work"):
        clock.wall += 1
        clock.cpu += 3
    summary = meter.summary()
    assert summary["cpu_seconds"] == summary["stages"]["work"]["cpu_seconds"] == 3


def test_a_stage_that_fails_is_closed(clock):
    with Meter() as meter:
        with pytest.raises(AttributeError), meter.stage("fails"):
            clock.missing()
        clock.wall += 1
        with meter.stage("works"):
            clock.wall += 2
    assert seconds(meter) == {"fails": 0, "works": 2}


def test_memory_freed_within_a_stage_is_in_its_peak():
    size = 128 << 20
    with Meter(interval=0.001) as meter:
        with meter.stage("before"):
            pass
        with meter.stage("large"):
            # Not from the allocator, which may hold as much from before.
            large = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
            time.sleep(0.1)  # for the sampling thread
            del large
    stages = meter.summary()["stages"]
    # Half of what is held for sure: other memory of the process may go back to the system meanwhile.
    assert stages["large"]["peak_rss"] - stages["before"]["peak_rss"] > size // 2
    assert meter.summary()["peak_rss"] >= stages["large"]["peak_rss"]
