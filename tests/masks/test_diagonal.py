import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked, gaussian, is_legal, loop_diagonal, loop_floor, total, whole_numbers

from optimum_eggs.errors import ConfigError, NumericalError, ShapeError
from optimum_eggs.masks import diagonal_mask, expander_mask, topn_mask
from optimum_eggs.pattern import NMPattern

SMALL = [(n, m) for n, m in PATTERNS if m <= 16]
SEEDS = st.integers(0, 2**32 - 1)


@checked
@given(st.sampled_from(SMALL), st.data(), st.integers(1, 40), SEEDS)
def test_it_keeps_what_a_loop_keeps(legal, data, rows, seed):
    n, m = legal
    min_degree = data.draw(st.integers(0, n))
    score = gaussian(rows, 2 * m, seed=seed, dtype=torch.float64)
    assert torch.equal(diagonal_mask(score, NMPattern(n, m), min_degree), loop_diagonal(score, n, m, min_degree))


@pytest.mark.parametrize(("n", "m", "min_degree"), [(1, 2, 1), (2, 4, 1), (2, 4, 2), (3, 8, 2), (16, 32, 5)])
def test_every_input_keeps_the_floor_in_every_tile(n, m, min_degree):
    mask = diagonal_mask(gaussian(3 * m, 2 * m), NMPattern(n, m), min_degree)
    assert is_legal(mask, n, m)
    assert loop_floor(mask, m) >= min_degree


def test_without_a_floor_it_is_the_topn_mask():
    score = gaussian(10, 16)
    assert torch.equal(diagonal_mask(score, NMPattern(2, 4), 0), topn_mask(score, NMPattern(2, 4)))


@checked
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]), SEEDS)
def test_the_optimal_mask_is_never_worse(legal, seed):
    pattern = NMPattern(*legal)
    score = whole_numbers(2 * pattern.m, 2 * pattern.m, below=100, seed=seed)
    diagonal, optimal = diagonal_mask(score, pattern, 1), expander_mask(score, pattern, 1, band=pattern.m)
    assert total(score, diagonal) <= total(score, optimal) <= total(score, topn_mask(score, pattern))


def test_small_scores_count_beside_large_ones():
    # 1e30 + 1 == 1e30 in float32: a mask that adds a bonus to the forced scores would lose the second choice.
    score = torch.eye(4) * 1e30
    score[:, 3] += torch.tensor([1.0, 1, 1, 0])
    score[3, 1] = 1
    kept = diagonal_mask(score, NMPattern(2, 4), 1)
    assert kept.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize("score", [torch.zeros(6, 8), torch.ones(6, 8), -torch.ones(6, 8)])
def test_equal_scores_still_keep_n(score):
    assert is_legal(diagonal_mask(score, NMPattern(2, 4), 1), 2, 4)


def test_a_transposed_score_is_taken():
    score = gaussian(8, 12).t()
    assert torch.equal(diagonal_mask(score, NMPattern(2, 4), 1), loop_diagonal(score, 2, 4, 1))


def test_no_rows_give_no_rows():
    assert diagonal_mask(torch.zeros(0, 8), NMPattern(2, 4)).shape == (0, 8)


@pytest.mark.parametrize("min_degree", [-1, 3])
def test_a_floor_out_of_range_is_refused(min_degree):
    with pytest.raises(ConfigError, match=f"min_degree={min_degree} with diagonals at 2:4: .* between 0 and 2"):
        diagonal_mask(torch.ones(4, 4), NMPattern(2, 4), min_degree)


@pytest.mark.parametrize(("score", "error"), [(torch.ones(4, 6), ShapeError), (torch.ones(4, 4) / 0, NumericalError)])
def test_a_bad_score_is_refused(score, error):
    with pytest.raises(error, match="score h"):
        diagonal_mask(score, NMPattern(2, 4))
