import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    all_legal_tiles,
    checked,
    cut,
    exact_total,
    gaussian,
    is_legal,
    loop_floor,
    loop_topn,
    total,
    whole_numbers,
)

from optimum_eggs.errors import ConfigError, NumericalError, ShapeError
from optimum_eggs.masks import expander, expander_mask, topn_mask
from optimum_eggs.pattern import NMPattern

SEEDS = st.integers(0, 2**32 - 1)
# (n, m, band, min_degree); tight where band * n == min_degree * m: every column keeps exactly the floor.
LOOSE = [(2, 4, 16, 1), (2, 4, 16, 4), (1, 4, 16, 1), (6, 8, 16, 3), (3, 8, 7, 2), (4, 16, 20, 4), (8, 32, 16, 1)]
TIGHT = [
    (1, 2, 2, 1),
    (2, 4, 4, 2),
    (1, 4, 4, 1),
    (3, 4, 4, 3),
    (2, 4, 16, 8),
    (2, 8, 8, 2),
    (1, 16, 16, 1),
    (16, 32, 4, 2),
]


def holds(mask, n, m, band, min_degree):
    return is_legal(mask, n, m) and loop_floor(mask, band) >= min_degree


@pytest.mark.parametrize(("n", "m", "band", "min_degree"), LOOSE + TIGHT)
@pytest.mark.parametrize("below", [1 << 20, 4, 2])  # the smaller, the more ties
def test_no_mask_under_the_floor_scores_more(n, m, band, min_degree, below):
    score = whole_numbers(2 * band, 2 * m, below)
    mask = expander_mask(score, NMPattern(n, m), min_degree, band)
    assert holds(mask, n, m, band, min_degree)
    assert total(score, mask) == exact_total(score, n, m, min_degree, band)


@checked
@given(st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (3, 8), (5, 8)]), st.data(), st.integers(1, 12), SEEDS)
def test_no_mask_under_any_floor_that_can_hold_scores_more(legal, data, band, seed):
    n, m = legal
    min_degree = data.draw(st.integers(0, band * n // m))
    rows = band + data.draw(st.integers(0, 2 * band))
    score = whole_numbers(rows, m, below=data.draw(st.sampled_from([3, 1000])), seed=seed) - 1  # some below zero
    mask = expander_mask(score, NMPattern(n, m), min_degree, band)
    assert holds(mask, n, m, band, min_degree)
    assert total(score, mask) == exact_total(score, n, m, min_degree, band)


@pytest.mark.parametrize(("min_degree", "count"), [(1, 978), (2, 90)])
def test_it_finds_the_best_of_all_legal_tiles(min_degree, count):
    tiles = all_legal_tiles(2, 4, 4, min_degree)
    assert len(tiles) == count
    for seed in range(30):
        score = gaussian(4, 4, seed=seed, dtype=torch.float64)
        best = tiles[(tiles * score).sum((1, 2)).argmax()]
        assert torch.equal(expander_mask(score, NMPattern(2, 4), min_degree, band=4), best)


def test_rows_that_all_want_the_same_inputs_are_spread():
    score = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0, 0]]).expand(16, 8)
    mask = expander_mask(score, NMPattern(2, 8), 2, band=16)
    # 32 are kept and the floor takes 2 · 8; of the 16 left the first column takes what it has rows for.
    assert mask.sum(0).tolist() == [16, 4, 2, 2, 2, 2, 2, 2]
    assert total(score, mask) == exact_total(score, 2, 8, 2, 16)


@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0])
def test_equal_scores_keep_the_floor(fill):
    assert holds(expander_mask(torch.full((32, 16), fill), NMPattern(2, 4), 8, 16), 2, 4, 16, 8)


@pytest.mark.parametrize("rows", [16, 17, 31, 33, 40])
def test_the_last_band_takes_the_remaining_rows(rows):
    score = whole_numbers(rows, 8, below=1000)
    mask = expander_mask(score, NMPattern(2, 8), 3, band=16)
    assert all(int(mask[start:stop].sum(0).min()) >= 3 for start, stop in cut(rows, 16))
    assert total(score, mask) == exact_total(score, 2, 8, 3, 16)


def test_fewer_rows_than_a_band_are_one_band():
    score = whole_numbers(10, 8, below=1000)
    mask = expander_mask(score, NMPattern(2, 8), 2, band=16)
    assert int(mask.sum(0).min()) >= 2
    assert total(score, mask) == exact_total(score, 2, 8, 2, band=10)


def test_without_a_floor_it_is_the_topn_mask():
    score = gaussian(20, 32)
    assert torch.equal(expander_mask(score, NMPattern(2, 4), 0, 16), loop_topn(score, 2, 4))


def test_where_topn_keeps_the_floor_nothing_changes():
    score = gaussian(64, 32)
    mask = topn_mask(score, NMPattern(2, 4))
    assert loop_floor(mask, 64) >= 8
    assert torch.equal(expander_mask(score, NMPattern(2, 4), 8, 64), mask)


@checked
@given(st.sampled_from([(2, 4), (1, 8), (12, 16)]), st.floats(-30, 30), SEEDS)
def test_the_floor_holds_and_costs_score_at_any_scale(legal, exponent, seed):
    n, m = legal
    score = gaussian(40, 2 * m, seed=seed, dtype=torch.float64) * 10**exponent
    mask = expander_mask(score, NMPattern(n, m), 1, band=16)
    assert holds(mask, n, m, 16, 1)
    assert total(score, mask) <= total(score, topn_mask(score, NMPattern(n, m)))


def test_scores_of_sixty_orders_of_magnitude_end():
    score = 10 ** (gaussian(32, 16, dtype=torch.float64).clamp(-3, 3) * 10)
    assert holds(expander_mask(score, NMPattern(4, 16), 8, 32), 4, 16, 32, 8)


def test_a_transposed_score_is_taken():
    score = gaussian(16, 24)
    assert torch.equal(
        expander_mask(score.t(), NMPattern(2, 8), 2, 12), expander_mask(score.t().contiguous(), NMPattern(2, 8), 2, 12)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_gives_the_exact_total(dtype):
    score = whole_numbers(32, 16, below=200).to(dtype)  # integers below 256 are exact in all of them
    mask = expander_mask(score, NMPattern(2, 8), 3, 16)
    assert total(score, mask) == exact_total(score, 2, 8, 3, 16)


def test_solving_in_pieces_changes_nothing(monkeypatch):
    score = gaussian(64, 32)
    whole = expander_mask(score, NMPattern(2, 8), 3, 16)
    monkeypatch.setattr(expander, "_CHUNK", 1)  # one tile at a time
    assert torch.equal(expander_mask(score, NMPattern(2, 8), 3, 16), whole)


def test_the_score_is_left_alone():
    score = gaussian(32, 16)
    before = score.clone()
    expander_mask(score, NMPattern(2, 8), 3, 16)
    assert torch.equal(score, before)


def test_no_rows_give_no_rows():
    assert expander_mask(torch.zeros(0, 8), NMPattern(2, 4)).shape == (0, 8)


@pytest.mark.parametrize(
    ("rows", "min_degree", "band", "message"),
    [
        (
            16,
            3,
            4,
            r"min_degree=3 cannot hold at 2:4: 4 rows keep 8 .*, and 4 inputs need 3 each; use a band of 6",
        ),
        (1, 1, 16, r"min_degree=1 cannot hold at 2:4: 1 rows keep 2 weights .* use a band of 2 rows or more"),
        (16, -1, 16, r"min_degree=-1 is negative; use 0 for no floor"),
        (16, 1, 0, r"band=0 is not a number of rows; use 1 or more"),
    ],
)
def test_a_floor_that_cannot_hold_is_refused_with_its_reason(rows, min_degree, band, message):
    with pytest.raises(ConfigError, match=message):
        expander_mask(torch.ones(rows, 8), NMPattern(2, 4), min_degree, band)


@pytest.mark.parametrize(("score", "error"), [(torch.ones(4, 6), ShapeError), (torch.ones(4, 4) / 0, NumericalError)])
def test_a_bad_score_is_refused(score, error):
    with pytest.raises(error, match="score h"):
        expander_mask(score, NMPattern(2, 4))
