"""Parts of a block that are settled are kept, and what comes of it is the same as without."""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import Walk
from optimum_eggs.calibration.hooks import Stop
from optimum_eggs.calibration.kept import Kept
from optimum_eggs.engine import block as block_engine
from optimum_eggs.engine import prune_model

WINDOWS = tiny.make_windows(8, 16)
KINDS = {
    "wanda": {"preset": "wanda"},
    "fast": {"preset": "fast"},
    "best": {"preset": "best", "block_tuning": 4},
    "int4": {"preset": "fast", "values": "int4", "rounding": "gptq"},
}


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pruned_model_is_the_same_bit_for_bit(name, kind, monkeypatch):
    values, found = KINDS[kind], []
    for _ in range(2):
        model = tiny.make_model(name)
        prune_model(model, EGGSConfig("2:4", batch_size=2, band=4, **values), WINDOWS)
        found.append(model.state_dict())
        monkeypatch.setattr(Walk, "settle", lambda *given: None)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_attention_runs_for_its_own_layers_and_for_what_follows_it():
    model = tiny.make_model("llama")
    runs = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    prune_model(model, EGGSConfig("2:4", preset="wanda", batch_size=2), WINDOWS, progress=False)  # nothing is timed
    # of one batch to see what a block gives and the order in it; of all before `o_proj`, and before `up_proj`
    assert len(runs) == 2 + 2 * len(WINDOWS) // 2


def test_the_dense_block_is_gone_before_the_last_layers_are_solved(monkeypatch):
    twins, alive = [], []
    copied, pruned = copy.deepcopy, block_engine._prune_wave

    def deepcopy(block):
        twin = copied(block)
        twins.append(weakref.ref(twin))
        return twin

    def prune_wave(walk, wave, *given):
        alive.append(twins[-1]() is not None)
        return pruned(walk, wave, *given)

    monkeypatch.setattr(block_engine, "copy", SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(block_engine, "_prune_wave", prune_wave)
    prune_model(tiny.make_model("llama"), EGGSConfig("2:4", preset="fast", batch_size=2, band=4), WINDOWS)
    assert alive == [True, True, True, False] * 2


class Part(nn.Module):
    """Multiplies, and counts its calls; `shape` makes of that what it gives."""

    def __init__(self, shape=lambda x: x):
        super().__init__()
        self.factor, self.calls, self.shape = 2.0, 0, shape

    def forward(self, x):
        self.calls += 1
        return self.shape(x * self.factor)


class Block(nn.Module):
    """Two parts, one behind the other; what the second gives is written over."""

    def __init__(self, first, second, times=1):
        super().__init__()
        self.first, self.second, self.times = first, second, times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            y = self.second(x)
            y = y[0] if isinstance(y, tuple) else y
            x = y.add_(1) if y.shape == x.shape else x + y.mean()
        return x


def passed(kept, block, count=2, most=None):
    """What the block gives for each of two batches."""
    found = []
    for batch in range(count):
        x = torch.full((3, 4), batch + 1.0)
        with kept.standing_in(block, batch, x.nbytes if most is None else most):
            found.append(block(x))
    return torch.stack(found)


def check(block, settled, others, calls, most=None):
    """Three passes give the same, and the second part runs so many times in them."""
    kept = Kept(list)
    expected = passed(kept, block)
    kept.settle(block, settled, others)
    block.second.calls = 0
    for _ in range(3):
        assert torch.equal(passed(kept, block, most=most), expected)
    assert block.second.calls == calls
    assert "forward" not in vars(block.second)
    return kept


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: (x,), lambda x: (x, None)])
def test_a_settled_part_runs_once_for_every_batch(shape):
    block = Block(Part(), Part(shape))
    kept = check(block, [block.first, block.second], [], calls=2)
    block.second.factor = 3.0
    kept.forget(block)
    assert float(passed(kept, block)[0, 0, 0]) == 1 * 2 * 3 + 1


@pytest.mark.parametrize("shape", [lambda x: (x, object()), lambda x: x.repeat(2, 1), lambda x: x.double()])
def test_what_cannot_be_kept_runs_every_time(shape):
    block = Block(Part(), Part(shape))
    check(block, [block.second], [], calls=6)


def test_a_part_that_is_called_again_runs_again():
    block = Block(Part(), Part(), times=2)
    check(block, [block.second], [], calls=2 * 2 + 2 * 2)  # its second call runs in every pass


def test_nothing_behind_a_part_that_may_change_is_kept():
    block = Block(Part(), Part())
    kept = check(block, [block.second], [block.first], calls=6)
    block.first.factor = 5.0
    assert float(passed(kept, block)[0, 0, 0]) == 1 * 5 * 2 + 1
    kept.settle(block, [block.first, block.second], [])
    assert torch.equal(passed(kept, block), passed(kept, block))
    assert block.second.calls == 6 + 2 + 2


def test_a_pass_that_ends_early_leaves_the_rest_to_the_next():
    kept, block = Kept(list), Block(Part(), Part())
    kept.settle(block, [block.second], [])
    with suppress(Stop), kept.standing_in(block, 0, 10**6):
        block.first(torch.ones(2))
        raise Stop
    assert "forward" not in vars(block.second)
    expected = passed(kept, block)
    assert torch.equal(passed(kept, block), expected)
    assert block.second.calls == 2
