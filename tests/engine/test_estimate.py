"""What is told before the work begins, against what is then done."""

from __future__ import annotations

import pytest
import tiny

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import InMemoryBlocks, find_block_list
from optimum_eggs.calibration.states import StatesOnDisk, states_in_memory
from optimum_eggs.engine import estimate, prune
from optimum_eggs.engine.plan import make_plan
from optimum_eggs.engine.prune import prune_blocks, prune_model
from optimum_eggs.measure import Meter

WINDOWS = tiny.make_windows(8, 16)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("values", [{}, {"preset": "best", "band": 4}])
def test_the_passes_of_a_block_are_counted(name, values, monkeypatch):
    counted = []
    passes = estimate.passes
    monkeypatch.setattr(estimate, "passes", lambda *given: counted.append(passes(*given)) or counted[-1])
    model = tiny.make_model(name)
    config = EGGSConfig("2:4", batch_size=1, block_tuning=0, **values)
    last = find_block_list(model).blocks[-1]
    begun, ended = [], []
    last.register_forward_pre_hook(lambda *_: begun.append(1))
    last.register_forward_hook(lambda *_: ended.append(1))
    prune_model(model, config, WINDOWS)
    assert len(ended) / len(WINDOWS) <= counted[0] <= len(begun) / len(WINDOWS)


def test_the_gram_matrices_of_a_wave_of_experts_are_counted(monkeypatch):
    found = []
    estimated = prune.estimate
    monkeypatch.setattr(prune, "estimate", lambda *given: found.append(estimated(*given)) or found[-1])
    for limit in (2**30, 0):  # all four of a matrix at once, or one
        monkeypatch.setattr(estimate, "wave_bytes", lambda device, limit=limit: limit)
        prune_model(tiny.make_model("mixtral"), EGGSConfig("2:4", preset="magnitude", batch_size=1), WINDOWS)
    assert found[0].bytes - found[1].bytes == 3 * 4 * 64 * 64


def test_hidden_states_on_disk_are_no_memory_and_are_not_read_for_their_size(tmp_path, monkeypatch):
    found, reads = [], []
    estimated, read = prune.estimate, StatesOnDisk.__getitem__

    def watched(*given):
        before = len(reads)
        found.append((estimated(*given), len(reads) - before))
        return found[-1][0]

    monkeypatch.setattr(prune, "estimate", watched)
    monkeypatch.setattr(StatesOnDisk, "__getitem__", lambda states, at: reads.append(at) or read(states, at))
    for store in (states_in_memory, lambda size, device: StatesOnDisk(tmp_path)):
        model, config = tiny.make_model("llama"), EGGSConfig("2:4", preset="magnitude", batch_size=1)
        plan = make_plan(model, config)
        with Meter() as meter:
            prune_blocks(model, InMemoryBlocks(model, plan.block_list), plan, config, WINDOWS, meter, store=store)
    (in_memory, _), (on_disk, read_for_it) = found
    assert in_memory.bytes - on_disk.bytes == 2 * 4 * WINDOWS.numel() * model.config.hidden_size
    assert read_for_it < len(WINDOWS)
