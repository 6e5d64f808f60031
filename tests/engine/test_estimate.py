"""What is told before the work begins, against what is then done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import InMemoryBlocks, find_block_list
from optimum_eggs.calibration.states import StatesOnDisk, states_in_memory
from optimum_eggs.engine import estimate, precision, prune
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


@pytest.mark.parametrize(("takes", "runs"), [(0.001, 32), (0.5, 6), (10.0, 2)])
def test_what_is_timed_goes_on_for_some_seconds_or_runs(takes, runs, monkeypatch):
    clock, done = [0.0], []

    def work():
        done.append(takes if len(done) == 1 else takes * 1.001)
        clock[0] += done[-1]
        return torch.zeros(())

    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    assert estimate._seconds(work) == pytest.approx(takes)
    assert len(done) == runs


def said(config, monkeypatch, processes=1, of_pass=1.0):
    """Seconds said of a Llama, where a product takes one and a pass as it tunes half of one; and its blocks."""
    model, found, whole = tiny.make_model("llama"), [], prune.estimate

    def watched(walk, *given):
        timed = iter([of_pass, 1.0, 0.5])
        alone, walk.ranks = walk.ranks, SimpleNamespace(size=processes)
        with monkeypatch.context() as patched:
            patched.setattr(estimate, "_seconds", lambda work: next(timed))
            found.append(whole(walk, *given))
        walk.ranks = alone
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(prune, "estimate", watched)
        prune_model(model, config, WINDOWS)
    return found[0].seconds, len(find_block_list(model).blocks)


@pytest.mark.parametrize("steps", [{"block_tuning": 4}, {"block_tuning": 4, "rounding_tuning": 2}])
def test_a_step_of_tuning_is_counted_in_its_own_precision(steps, monkeypatch):
    given = {"preset": "best", "band": 4, "batch_size": 1, "short_share": 0.0, "values": "int8"}
    before, blocks = said(EGGSConfig("2:4", **given, **dict.fromkeys(steps, 0)), monkeypatch)
    after, _ = said(EGGSConfig("2:4", **given, **steps), monkeypatch)
    passes = (1 + 2 * len(steps)) * len(WINDOWS)  # of the dense block, and before the first step and after the last
    assert after - before == pytest.approx(blocks * (sum(steps.values()) * estimate._STEP * 0.5 + passes))


def test_processes_share_what_solvers_do(monkeypatch):
    config = EGGSConfig("2:4", preset="alps", band=4, batch_size=1)
    one, two, many = (said(config, monkeypatch, processes, 0.0)[0] for processes in (1, 2, 10**9))
    assert one > 2 * many
    assert two - many == pytest.approx((one - many) / 2)


def test_an_interrupt_while_tuning_is_timed_leaves_the_model_as_it_was(monkeypatch):
    model = tiny.make_model("llama").to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    timed = []

    def interrupted(work):
        timed.append(model.model.layers[0].mlp.up_proj.weight.dtype)
        if len(timed) == 3:
            work()
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(precision, "has_bfloat16_products", lambda device: True)
    monkeypatch.setattr(estimate, "_seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, EGGSConfig("2:4", preset="best", band=4, batch_size=1, permutation=False), WINDOWS)
    assert timed == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
