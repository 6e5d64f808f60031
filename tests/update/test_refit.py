import itertools
import math

import pytest
import torch
from oracles import damped_gram, dense_refit, gaussian, random_mask, refit_objective
from problems import COLUMNS, KINDS, inputs

from optimum_eggs.errors import ShapeError
from optimum_eggs.update import Problem, masked_refit, relative_error

EPS = torch.finfo(torch.float64).eps


def problem(kind="random", dtype=torch.float64):
    x = inputs(kind)
    return gaussian(6, COLUMNS, dtype=dtype), random_mask(6, COLUMNS, 2, 4), (x @ x.T).to(dtype)


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_reach_the_least_squares_solution(kind, damping):
    weight, mask, gram = problem(kind)
    exact = dense_refit(weight, mask, gram, damping)
    # Both solve a system of 16 unknowns a row: backward errors of some rounding errors a term, times the condition.
    allowed = COLUMNS * EPS * float(torch.linalg.cond(damped_gram(gram, damping)))
    found = masked_refit(weight, mask, Problem(gram, damping), steps=100)
    assert (found - exact).norm() <= allowed * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_falls_with_every_step(kind):
    weight, mask, gram = problem(kind)
    values = [
        refit_objective(weight, masked_refit(weight, mask, Problem(gram), steps=k), gram, 0.01) for k in range(25)
    ]
    assert values[1] < values[0]
    # Once solved, the objective stands still up to the rounding of a sum of COLUMNS² terms, which cancel by the ratio
    # of the largest eigenvalue to the value reached.
    large = float(torch.linalg.matrix_norm(damped_gram(gram, 0.01), 2) * weight.norm() ** 2)
    assert all(after <= before + COLUMNS**2 * EPS * large for before, after in itertools.pairwise(values))


def test_no_steps_are_the_masked_weight():
    weight, mask, gram = problem()
    assert torch.equal(masked_refit(weight, mask, Problem(gram), steps=0), weight * mask)


@pytest.mark.parametrize("kind", [*KINDS, "no input"])
def test_it_is_zero_off_the_mask(kind):
    weight, mask, gram = problem(kind)
    found = masked_refit(weight, mask, Problem(gram))
    assert not found[~mask].any()
    assert (found[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 15, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_finite_and_better_than_no_update(kind, steps, dtype):
    weight, mask, gram = problem(kind, dtype)
    found = masked_refit(weight, mask, Problem(gram), steps=steps)
    assert torch.isfinite(found).all()
    assert refit_objective(weight, found, gram, 0.01) < refit_objective(weight, weight * mask, gram, 0.01)


@pytest.mark.parametrize("damping", [1e-6, 1e-8, 1e-12, 0])
@pytest.mark.parametrize("kind", ["duplicate inputs", "few tokens"])
def test_damping_below_the_rounding_of_float32_does_no_harm(kind, damping):
    # The curvature along a direction that the inputs do not see is then rounding, and may be negative.
    for seed in range(20):
        weight, (_, mask, gram) = gaussian(6, COLUMNS, seed=seed), problem(kind, torch.float32)
        found = masked_refit(weight, mask, Problem(gram, damping), steps=50)
        assert torch.isfinite(found).all()
        assert refit_objective(weight, found, gram, damping) < refit_objective(weight, weight * mask, gram, damping)


def test_no_damping_still_updates():
    weight, mask, gram = problem()
    exact = dense_refit(weight, mask, gram, damping=0)
    allowed = COLUMNS * EPS * float(torch.linalg.cond(gram))
    assert (masked_refit(weight, mask, Problem(gram, 0), steps=100) - exact).norm() <= allowed * exact.norm()


def test_the_unit_of_an_input_makes_no_difference():
    # What the preconditioner is for. Powers of two scale without rounding, and this damping is rounded away.
    weight, mask, gram = problem("correlated")
    unit = 2.0 ** torch.randint(-8, 9, (COLUMNS,), generator=torch.Generator().manual_seed(0))
    found = masked_refit(weight, mask, Problem(gram, 1e-30), steps=5)
    assert not torch.equal(found, weight * mask)
    scaled = masked_refit(weight / unit, mask, Problem(gram * unit * unit[:, None], 1e-30), steps=5)
    assert torch.equal(scaled * unit, found)


def test_inputs_that_are_all_zero_leave_the_masked_weight():
    weight, mask, gram = problem("no input")
    assert torch.equal(masked_refit(weight, mask, Problem(gram)), weight * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_stay_zero_and_do_not_disturb_others(dtype):
    weight, mask, gram = problem(dtype=dtype)
    weight[2] = 0
    found = masked_refit(weight, mask, Problem(gram), steps=100)
    assert not found[2].any()
    alone = masked_refit(weight[3:4], mask[3:4], Problem(gram), steps=100)
    # The same sums, maybe in another order: COLUMNS roundings a sum, times the condition.
    allowed = COLUMNS * torch.finfo(dtype).eps * float(torch.linalg.cond(damped_gram(gram, 0.01)))
    assert (found[3:4] - alone).norm() <= allowed * alone.norm()


def test_a_mask_that_keeps_every_weight_that_is_not_zero_changes_nothing():
    weight, mask, gram = problem()
    assert torch.equal(masked_refit(weight * mask, mask, Problem(gram)), weight * mask)


def test_what_is_given_is_left_alone():
    given = problem()
    before = [tensor.clone() for tensor in given]
    masked_refit(given[0], given[1], Problem(given[2]))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_relative_error_is_that_of_the_outputs(kind):
    weight, mask, gram = problem(kind)
    x, pruned = inputs(kind), weight * mask
    explicit = float(((weight - pruned) @ x).norm() ** 2 / (weight @ x).norm() ** 2)
    # Two quadratic forms of COLUMNS² terms over sums of 200 products; the terms cancel by up to the condition of the
    # part that the outputs see, which is 1 to the accuracy asked for here: random weights do not sit in one direction.
    assert relative_error(weight, pruned, gram) == pytest.approx(explicit, rel=(COLUMNS**2 + 200) * EPS)


def test_the_update_lowers_the_relative_error():
    weight, mask, gram = problem("correlated")
    assert relative_error(weight, masked_refit(weight, mask, Problem(gram)), gram) < relative_error(
        weight, weight * mask, gram
    )


def test_the_relative_error_is_one_of_nothing_kept_and_zero_of_everything():
    weight, _, gram = problem()
    assert relative_error(weight, torch.zeros_like(weight), gram) == 1
    assert relative_error(weight, weight, gram) == 0


def test_the_relative_error_of_a_layer_that_does_nothing_is_zero():
    weight, mask, gram = problem("no input")
    assert relative_error(weight, weight * mask, gram) == 0


def test_the_relative_error_is_never_negative():
    # A ratio of squares; here the loss is below the rounding of float32.
    _, mask, gram = problem("few tokens", torch.float32)
    errors = [
        relative_error(row[None], masked_refit(row[None], mask[:1], Problem(gram, 1e-4), steps=50), gram)
        for row in gaussian(100, COLUMNS, seed=3)
    ]
    assert min(errors) >= 0


@pytest.mark.parametrize(
    ("mask", "gram"), [((6, 16), (COLUMNS, COLUMNS)), ((6, COLUMNS), (16, 16)), ((6, COLUMNS), (32,))]
)
def test_shapes_that_do_not_fit_are_refused(mask, gram):
    with pytest.raises(
        ShapeError, match=r"do not belong together; weight and mask must be \(out, in\), gram \(in, in\)"
    ):
        masked_refit(torch.ones(6, COLUMNS), torch.ones(mask, dtype=torch.bool), Problem(torch.ones(gram)))


def test_the_relative_error_never_hides_a_nan():
    weight = torch.ones(2, 4)
    spoilt = weight.clone()
    spoilt[0, 0] = float("nan")
    assert math.isnan(relative_error(weight, spoilt, torch.eye(4)))
