from __future__ import annotations

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import batches_of
from optimum_eggs.engine import prune_model

WINDOWS = tiny.make_windows(5, 20)


def test_without_short_windows_the_batches_are_the_windows():
    assert [len(batch) for batch in batches_of(WINDOWS, 2)] == [2, 2, 1]
    assert torch.equal(torch.cat(batches_of(WINDOWS, 2)), WINDOWS)


def test_short_windows_are_cut_from_one_window_after_another():
    batches = batches_of(WINDOWS, 2, short_share=1.2, seed=1)
    assert all(torch.equal(*pair) for pair in zip(batches[:3], WINDOWS.split(2), strict=True))
    assert [tuple(batch.shape) for batch in batches[3:]] == [(4, 8), (4, 8), (4, 8), (2, 8)]
    cut = torch.cat(batches[3:])
    assert cut.numel() <= 1.2 * WINDOWS.numel()
    for index, piece in enumerate(cut.tolist()):
        assert piece in WINDOWS[index % 5].unfold(0, 8, 1).tolist()
    assert len({tuple(piece) for piece in cut.tolist()}) > 10  # from random places
    again, other = (batches_of(WINDOWS, 2, 1.2, seed=seed) for seed in (1, 2))
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    assert not torch.equal(torch.cat(other[3:]), cut)


@pytest.mark.parametrize("tokens", [2, 7])
def test_windows_that_are_short_themselves_are_seen_again(tokens):
    windows = tiny.make_windows(4, tokens)
    *_, short = batches_of(windows, 4, short_share=1)
    assert torch.equal(short, windows)


@pytest.mark.parametrize("share", [0.1, 0.4, 1, 2])
def test_processes_get_equal_parts_of_every_batch(share):
    windows = tiny.make_windows(12, 20)
    assert all(len(batch) % 4 == 0 for batch in batches_of(windows, 4, share))


@pytest.mark.parametrize("settings", [{"preset": "fast"}, {"preset": "best", "block_tuning": 4}])
def test_short_windows_calibrate(settings):
    found = {}
    for share in (0, 0.5):
        model = tiny.make_model("llama")
        report = prune_model(model, EGGSConfig("2:4", band=8, short_share=share, **settings), WINDOWS)
        assert report.config["short_share"] == share
        assert report.calibration["windows"] == len(WINDOWS)
        found[share] = model(WINDOWS).logits
    assert not torch.equal(found[0], found[0.5])
