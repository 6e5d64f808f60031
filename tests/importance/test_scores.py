import pytest
import torch
from oracles import gaussian, loop_ria, loop_wanda

from optimum_eggs.errors import ConfigError
from optimum_eggs.importance import IMPORTANCE, importance_score, magnitude, ria, wanda

WEIGHT = gaussian(7, 12, dtype=torch.float64)
NORM = gaussian(12, seed=1, dtype=torch.float64).abs()
# Positive sums of up to 12 numbers, two divisions, a power and two products: under 24 roundings, whatever the order.
ROUNDING = 24 * torch.finfo(torch.float64).eps


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)


def test_magnitude_is_the_size_of_the_weight():
    assert torch.equal(magnitude(torch.tensor([[-2.0, 3, 0]])), torch.tensor([[2.0, 3, 0]]))


def test_wanda_is_what_a_loop_finds():
    assert_equal(wanda(WEIGHT, NORM), loop_wanda(WEIGHT, NORM))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.5])
def test_ria_is_what_a_loop_finds(exponent):
    assert_equal(ria(WEIGHT, NORM, exponent), loop_ria(WEIGHT, NORM, exponent))


def test_the_exponent_of_ria_is_one_half_by_default():
    assert torch.equal(ria(WEIGHT, NORM), ria(WEIGHT, NORM, 0.5))
    assert not torch.equal(ria(WEIGHT, NORM), ria(WEIGHT, NORM, 1.0))


def test_ria_does_not_change_with_the_scale_of_the_weight():
    assert torch.equal(ria(WEIGHT * 1024, NORM), ria(WEIGHT, NORM))  # a power of two: no rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns_of_zeros_score_zero(dtype):
    weight, norm = WEIGHT.to(dtype, copy=True), NORM.to(dtype)
    weight[2], weight[:, 5] = 0, 0
    score = ria(weight, norm)
    assert torch.isfinite(score).all()
    assert not score[2].any()
    assert not score[:, 5].any()
    assert (score > 0).sum() == 6 * 11


def test_all_zero_weights_score_zero():
    assert torch.equal(ria(torch.zeros(3, 4), torch.ones(4)), torch.zeros(3, 4))


def test_a_dead_input_scores_zero():
    norm = NORM.clone()
    norm[3] = 0
    for name in ("ria", "wanda"):
        score = importance_score(name, WEIGHT, norm)
        assert not score[:, 3].any()
        assert (score > 0).sum() == 7 * 11


def test_the_smallest_numbers_of_float32_score_finite():
    weight = torch.full((2, 4), torch.finfo(torch.float32).tiny)
    score = ria(weight, torch.ones(4))
    torch.testing.assert_close(score, torch.full((2, 4), 1 / 4 + 1 / 2), rtol=0, atol=0)  # exact: all are powers of two


@pytest.mark.parametrize("name", IMPORTANCE)
def test_the_registry_calls_every_score_with_all_it_needs(name):
    direct = {"magnitude": magnitude(WEIGHT), "wanda": wanda(WEIGHT, NORM), "ria": ria(WEIGHT, NORM, 0.7)}
    assert torch.equal(importance_score(name, WEIGHT, NORM, 0.7), direct[name])


def test_an_unknown_score_is_refused():
    with pytest.raises(ConfigError, match=r"importance='size' is unknown; use one of \['magnitude', 'ria', 'wanda'\]"):
        importance_score("size", WEIGHT, NORM)
