import pytest
import torch
from oracles import gaussian
from problems import COLUMNS, inputs

from optimum_eggs.errors import NumericalError, ShapeError
from optimum_eggs.update import Problem, corrected_target


def streams():
    """Inputs of the dense model X and of the pruned one X̂ (in, tokens), and a weight."""
    x = inputs("correlated")
    return x, x + 0.3 * gaussian(COLUMNS, 200, seed=5, dtype=torch.float64), gaussian(6, COLUMNS, dtype=torch.float64)


def target(weight, hat, x, correction=1.0, damping=0.01):
    return corrected_target(weight, weight @ ((x - hat) @ hat.T), Problem(hat @ hat.T, damping), correction)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.3])
def test_full_correction_is_the_ridge_regression_onto_the_dense_output(damping):
    x, hat, weight = streams()
    found = target(weight, hat, x, damping=damping)
    ridge = damping * float((hat * hat).sum(1).mean())
    # The same by least squares on stacked equations: [X̂ᵀ; √λ I] Zᵀ = [XᵀWᵀ; √λ Wᵀ].
    left = torch.cat([hat.T, ridge**0.5 * torch.eye(COLUMNS, dtype=torch.float64)])
    right = torch.cat([(weight @ x).T, ridge**0.5 * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    condition = float(torch.linalg.cond(left)) ** 2
    assert (found - expected).norm() <= COLUMNS * torch.finfo(torch.float64).eps * condition * expected.norm()


def test_a_share_of_the_correction_is_that_far_on_the_way():
    x, hat, weight = streams()
    half, whole = target(weight, hat, x, 0.5), target(weight, hat, x, 1.0)
    assert torch.equal(target(weight, hat, x, 0.0), weight)
    assert torch.allclose(half, (weight + whole) / 2, rtol=1e-14, atol=1e-14)
    lost = [float((w @ hat - weight @ x).norm()) for w in (weight, half, whole)]
    assert lost[2] < lost[1] < lost[0]


def test_rows_are_corrected_one_by_one():
    x, hat, weight = streams()
    assert torch.allclose(target(weight[2:5], hat, x), target(weight, hat, x)[2:5], rtol=1e-13, atol=1e-13)


def test_what_is_given_is_left_alone():
    x, hat, weight = streams()
    given = [weight, weight @ ((x - hat) @ hat.T), hat @ hat.T]
    before = [tensor.clone() for tensor in given]
    corrected_target(given[0], given[1], Problem(given[2]))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_unchanged_inputs_change_nothing():
    x, _, weight = streams()
    assert torch.equal(target(weight, x, x), weight)


def test_inputs_that_are_all_dead_change_nothing():
    _, _, weight = streams()
    dead = torch.zeros(COLUMNS, 200, dtype=torch.float64)
    assert torch.equal(target(weight, dead, dead, damping=0.0), weight)


def test_bad_input_is_refused():
    _, hat, weight = streams()
    problem = Problem(hat @ hat.T)
    with pytest.raises(ShapeError, match="do not belong together"):
        corrected_target(weight[:, 1:], weight[:, 1:], problem)
    with pytest.raises(ShapeError, match="missing"):
        corrected_target(weight, weight[1:], problem)
    singular = Problem(torch.ones(COLUMNS, COLUMNS, dtype=torch.float64), 0.0)
    with pytest.raises(NumericalError, match="cannot be factorised with damping"):
        corrected_target(weight, weight, singular)
