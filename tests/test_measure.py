import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from optimum_eggs import measure
from optimum_eggs.measure import Meter, devices_of


@pytest.fixture
def clock(monkeypatch):
    """Clocks that stand still unless they are moved."""
    now = SimpleNamespace(wall=100.0, cpu=50.0)
    fake = SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.cpu)
    monkeypatch.setattr(measure, "time", fake)
    return now


@pytest.fixture
def gpus(clock, monkeypatch):
    """GPUs that are still at work for some seconds: who waits for one of them sees the clock go on."""
    pending, peaks = {}, {}

    def wait(device):
        clock.wall += pending.pop(str(device), 0)

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.__setitem__(str(device), 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[str(device)])
    return SimpleNamespace(pending=pending, peaks=peaks)


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


def test_a_stage_ends_when_the_gpus_are_done(clock, gpus):
    gpus.pending["cuda:0"] = 100
    with Meter(["cuda:0", torch.device("cuda", 1)]) as meter:  # what was asked for before is not counted
        with meter.stage("outer"):
            gpus.pending["cuda:1"] = 10
            with meter.stage("inner"):
                gpus.pending.update({"cuda:0": 3, "cuda:1": 4})
            gpus.pending["cuda:0"] = 2
        gpus.pending["cuda:1"] = 5
    assert seconds(meter) == {"outer": 12, "inner": 7}
    assert meter.summary()["seconds"] == 24


def test_the_memory_of_the_gpu_that_takes_most_is_reported(gpus):
    with Meter(["cuda:0", "cpu", "cuda:1"]) as meter:
        gpus.peaks.update({"cuda:0": 7, "cuda:1": 9, "cuda:2": 11})
    assert meter.summary()["peak_cuda"] == 9


def test_where_no_gpu_is_used_none_is_asked(clock, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a GPU was asked")

    for holder, name in (
        (torch.accelerator, "synchronize"),
        (torch.cuda, "reset_peak_memory_stats"),
        (torch.cuda, "max_memory_allocated"),
    ):
        monkeypatch.setattr(holder, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with Meter(["cpu", "meta"]) as meter, meter.stage("work"):
        clock.wall += 1
    assert seconds(meter) == {"work": 1}
    assert "peak_cuda" not in meter.summary()


def test_the_devices_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert devices_of(model) == {torch.device("cpu"), torch.device("meta")}


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
