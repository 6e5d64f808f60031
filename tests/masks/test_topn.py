import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked, gaussian, is_legal, loop_topn, total, whole_numbers

from optimum_eggs.errors import NumericalError, ShapeError
from optimum_eggs.masks import topn_mask
from optimum_eggs.ops import native
from optimum_eggs.pattern import NMPattern

SEEDS = st.integers(0, 2**32 - 1)


@checked
@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 3), SEEDS)
def test_it_keeps_what_a_loop_keeps(legal, rows, groups, seed):
    n, m = legal
    score = gaussian(rows, groups * m, seed=seed)
    assert torch.equal(topn_mask(score, NMPattern(n, m)), loop_topn(score, n, m))


@checked
@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 3), SEEDS)
def test_among_ties_the_total_is_the_largest(legal, rows, groups, seed):
    n, m = legal
    score = whole_numbers(rows, groups * m, below=3, seed=seed)
    mask = topn_mask(score, NMPattern(n, m))
    assert is_legal(mask, n, m)
    assert total(score, mask) == total(score, loop_topn(score, n, m))


@pytest.mark.skipif(native.missing is not None, reason="the native extension was not built")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (5, 16)])
@pytest.mark.parametrize("groups", [1, 63, 64, 130])
def test_with_and_without_the_extension_it_keeps_the_same(monkeypatch, n, m, groups):
    score = torch.cat([whole_numbers(3, groups * m, below=3, seed=m), gaussian(2, groups * m, seed=m)])
    mask = topn_mask(score, NMPattern(n, m))
    monkeypatch.setattr(native, "missing", "as if")
    assert torch.equal(mask, topn_mask(score, NMPattern(n, m)))


def test_m_may_be_what_the_extension_takes_at_the_most_and_more():
    for m in (native.MOST_COMPARED, 2 * native.MOST_COMPARED):
        score = gaussian(3, 2 * m)
        assert torch.equal(topn_mask(score, NMPattern(5, m)), loop_topn(score, 5, m))


def test_scores_need_not_be_plain_tensors_in_plain_surroundings():
    score = gaussian(4, 16, seed=3)
    expected = loop_topn(score, 2, 4)
    with torch.device("meta"):
        assert torch.equal(topn_mask(score, NMPattern(2, 4)), expected)
    assert torch.equal(topn_mask(score.clone().requires_grad_(), NMPattern(2, 4)), expected)
    assert torch.equal(topn_mask(torch._neg_view(-score), NMPattern(2, 4)), expected)


def test_scores_of_zero_still_keep_n():
    assert is_legal(topn_mask(torch.zeros(3, 16), NMPattern(3, 8)), 3, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_taken(dtype):
    score = gaussian(6, 32, dtype=dtype)
    assert total(score, topn_mask(score, NMPattern(2, 4))) == total(score, loop_topn(score, 2, 4))


def test_a_transposed_score_is_taken():
    score = gaussian(16, 5).t()
    assert torch.equal(topn_mask(score, NMPattern(2, 4)), loop_topn(score, 2, 4))


def test_no_rows_give_no_rows():
    assert topn_mask(torch.zeros(0, 8), NMPattern(2, 4)).shape == (0, 8)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (torch.zeros(8), ShapeError, r"score has shape \(8,\); it must be \(out, in\)"),
        (torch.zeros(2, 6), ShapeError, r"score has in=6, which is not a multiple of m=4"),
        (
            torch.tensor([[1.0, 2, float("nan"), 4]]),
            NumericalError,
            r"score holds NaN or infinite values; look for them",
        ),
        (torch.tensor([[1.0, 2, float("inf"), 4]]), NumericalError, r"score holds NaN or infinite values"),
    ],
)
def test_a_bad_score_is_refused_with_its_reason(score, error, message):
    with pytest.raises(error, match=message):
        topn_mask(score, NMPattern(2, 4))
