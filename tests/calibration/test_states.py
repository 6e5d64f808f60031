"""Hidden states in the host's memory and on disk: a list like any other, and the same result."""

from __future__ import annotations

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import InMemoryBlocks, Walk, batches_of, find_block_list, states
from optimum_eggs.calibration.states import StatesOnDisk, StatesOnHost, states_in_memory
from optimum_eggs.engine import prune_model
from optimum_eggs.measure import Meter

WINDOWS = tiny.make_windows(8, 16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=["host", "disk"])
def held(request, tmp_path):
    return StatesOnHost() if request.param == "host" else StatesOnDisk(tmp_path)


def test_what_is_written_is_read_again(held):
    values = [torch.randn(2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    held.extend(values)
    assert len(held) == 3
    assert all(torch.equal(own, value) and own.dtype == value.dtype for own, value in zip(held, values, strict=True))
    assert torch.equal(held[-1], values[2])
    held[1] = values[0].t()
    assert torch.equal(held[1], values[0].t())
    with pytest.raises(IndexError):
        held[3]
    with pytest.raises(IndexError):
        held[3] = values[0]
    with pytest.raises(IndexError, match="appended, not inserted"):
        held.insert(0, values[0])
    with pytest.raises(TypeError, match="replaced, not deleted"):
        del held[0]


def test_what_was_read_stays_as_it_was(held):
    first = torch.ones(2, 3)
    held.append(first)
    first.zero_()
    read = held[0]
    held[0] = torch.full((2, 3), 2.0)
    assert torch.equal(read, torch.ones(2, 3))
    held[0].zero_()
    assert torch.equal(held[0], torch.full((2, 3), 2.0))


def test_memory_of_the_host_is_used_again():
    held = StatesOnHost()
    held.append(torch.ones(2, 3))
    place = held._kept[0][0].data_ptr()
    held[0] = torch.zeros(2, 3)
    assert held._kept[0][0].data_ptr() == place
    assert not held[0].any()


def test_states_stay_on_a_gpu_that_has_room_for_them(monkeypatch):
    assert states_in_memory(10**15, CPU) == []
    monkeypatch.setattr(states, "free_bytes", lambda device: 800)
    assert states_in_memory(100, GPU) == []
    assert isinstance(states_in_memory(101, GPU), StatesOnHost)


def test_what_torch_keeps_unused_is_free(monkeypatch):
    assert states.free_bytes(CPU) is None
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 30), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert states.free_bytes(GPU) == 110


@pytest.mark.parametrize(
    ("values", "lists"), [({"preset": "alps"}, 3), ({}, 6), ({"preset": "best", "block_tuning": 4}, 4)]
)
def test_the_model_is_the_same_bit_for_bit(values, lists, monkeypatch):
    made, init = [], StatesOnHost.__init__
    monkeypatch.setattr(StatesOnHost, "__init__", lambda held: made.append(held) or init(held))
    found = []
    for free in (None, 0):
        monkeypatch.setattr(states, "free_bytes", lambda device, free=free: free)
        model = tiny.make_model("llama")
        assert not made
        prune_model(model, EGGSConfig("2:4", batch_size=2, **values), WINDOWS)
        found.append(model.state_dict())
    # of the walk, of the dense stream where it is followed, and of each attention, two where errors are corrected
    assert len(made) == lists
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_list_is_asked_for_with_the_bytes_that_it_will_hold():
    asked = []
    model = tiny.make_model("llama")
    with Meter() as meter:
        walk = Walk(
            InMemoryBlocks(model, find_block_list(model)),
            batches_of(WINDOWS, 2, short_share=0.5),
            meter,
            lambda size, device: asked.append((size, device)) or [],
        )
        walk.store()
    assert asked == [(sum(hidden.nbytes for hidden in walk.hidden), CPU)] * 2
