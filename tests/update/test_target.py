import pytest
import torch
from oracles import gaussian
from problems import COLUMNS, inputs

from optimum_eggs.errors import NumericalError, ShapeError
from optimum_eggs.update import corrected_target


def streams():
    """Inputs of the dense model X and of the pruned one X̂ (in, tokens), and a weight."""
    x = inputs("correlated")
    return x, x + 0.3 * gaussian(COLUMNS, 200, seed=5, dtype=torch.float64), gaussian(6, COLUMNS, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.3])
def test_full_correction_is_the_ridge_regression_onto_the_dense_output(damping):
    x, hat, weight = streams()
    found = corrected_target(weight, hat @ hat.T, x @ hat.T, 1.0, damping)
    ridge = damping * float((hat * hat).sum(1).mean())
    # The same by least squares on stacked equations: [X̂ᵀ; √λ I] Zᵀ = [XᵀWᵀ; √λ Wᵀ].
    left = torch.cat([hat.T, ridge**0.5 * torch.eye(COLUMNS, dtype=torch.float64)])
    right = torch.cat([(weight @ x).T, ridge**0.5 * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    condition = float(torch.linalg.cond(left)) ** 2
    assert (found - expected).norm() <= COLUMNS * torch.finfo(torch.float64).eps * condition * expected.norm()


def test_a_share_of_the_correction_is_that_far_on_the_way():
    x, hat, weight = streams()
    gram, cross = hat @ hat.T, x @ hat.T
    half, whole = corrected_target(weight, gram, cross, 0.5), corrected_target(weight, gram, cross, 1.0)
    assert torch.equal(corrected_target(weight, gram, cross, 0.0), weight)
    assert torch.allclose(half, (weight + whole) / 2, rtol=1e-14, atol=1e-14)
    lost = [float((w @ hat - weight @ x).norm()) for w in (weight, half, whole)]
    assert lost[2] < lost[1] < lost[0]


def test_what_is_given_is_left_alone():
    x, hat, weight = streams()
    given = [weight, hat @ hat.T, x @ hat.T]
    before = [tensor.clone() for tensor in given]
    corrected_target(*given)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_unchanged_inputs_change_nothing():
    x, _, weight = streams()
    assert torch.equal(corrected_target(weight, x @ x.T, x @ x.T), weight)


def test_bad_input_is_refused():
    x, hat, weight = streams()
    with pytest.raises(ShapeError, match="do not belong together"):
        corrected_target(weight, hat @ hat.T, (x @ hat.T)[1:])
    with pytest.raises(NumericalError, match=r"not positive definite; raise damping=0.0"):
        corrected_target(weight, torch.ones(COLUMNS, COLUMNS, dtype=torch.float64), x @ hat.T, damping=0.0)


def test_inputs_that_are_all_dead_change_nothing():
    _, _, weight = streams()
    none = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    assert torch.equal(corrected_target(weight, none, none, damping=0.0), weight)
