import torch
from oracles import gaussian

from optimum_eggs.update import Problem


def problem(inputs, rank, dtype=torch.float32):
    x = gaussian(inputs, rank)
    return Problem((x @ x.t()).to(dtype), damping=0.01)


def test_a_large_penalty_is_factorised_in_the_dtype_of_the_gram_matrix_and_a_small_one_in_float64():
    of = problem(64, 200)
    limit = 100 * 64 * torch.finfo(torch.float32).eps
    assert of.penalised(1.01 * limit).dtype == torch.float32
    assert of.penalised(0.99 * limit).dtype == torch.float64
    assert problem(64, 200, torch.float64).penalised(1e-6).dtype == torch.float64


def test_both_are_factors_of_the_same_matrix():
    of = problem(48, 20)
    exact = Problem(of.gram.double(), of.damping)
    for penalty in (0.1, 1e-4):
        lower, wanted = of.penalised(penalty).double(), exact.penalised(penalty)
        matrix = wanted @ wanted.t()
        assert float((lower @ lower.t() - matrix).norm() / matrix.norm()) < 1e-6
        assert torch.allclose(matrix.diagonal(), torch.tensor(1 + penalty, dtype=torch.float64))


def test_the_gram_matrix_is_left_as_it_was():
    of = problem(16, 40)
    before = of.gram.clone()
    of.penalised(1.0), of.penalised(1e-5)
    assert torch.equal(of.gram, before)
