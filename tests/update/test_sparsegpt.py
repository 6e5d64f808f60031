import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import checked, damped_gram, gaussian, is_legal, loop_topn, loop_wanda
from problems import inputs

from optimum_eggs.errors import ConfigError, NumericalError, ShapeError
from optimum_eggs.pattern import NMPattern
from optimum_eggs.update import Problem, relative_error
from optimum_eggs.update.sparsegpt import sparsegpt

ROWS, COLUMNS = 6, 48
EPS = torch.finfo(torch.float64).eps
PATTERNS = [(2, 4), (4, 8), (1, 4), (6, 8), (1, 2), (5, 16)]
KINDS = ["random", "correlated", "dead inputs", "duplicate inputs", "few tokens", "no input"]


def gram_of(kind, seed=1):
    """XXᵀ (in, in), float64."""
    x = inputs(kind, COLUMNS, seed)
    return x @ x.T


def damped_hessian(gram, damping):
    dead = gram.diagonal() == 0
    return damped_gram(gram.double() + dead.diag(), damping)


def loop_sparsegpt(weight, gram, n, m, damping):
    """Optimal brain surgeon from left to right, the inverse over the columns that remain written out; in float64."""
    hessian = damped_hessian(gram, damping)
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]  # [j][0, 0] belongs to column j
    weight = weight.double().clone()
    weight[:, gram.diagonal() == 0] = 0
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for w, kept in zip(weight, mask, strict=True):
        for j in range(len(w)):
            if j % m == 0:
                saliency = {k: float(w[k] ** 2 / inverse[k][0, 0]) for k in range(j, j + m)}
                kept[sorted(saliency, key=lambda k: saliency[k])[m - n :]] = True
            if not kept[j]:
                w[j:] -= w[j] / inverse[j][0, 0] * inverse[j][0]
                w[j] = 0
    return mask, weight


def allowed(gram, damping, eps=EPS):
    """How far two results may be apart, relative to their norm.

    A row takes COLUMNS steps, each with a row of a matrix that two factorisations and an inversion of COLUMNS unknowns
    leave off by COLUMNS rounding errors times the condition.
    """
    return COLUMNS**2 * eps * float(torch.linalg.cond(damped_hessian(gram, damping)))


def close(left, right, tolerance):
    return float((left.double() - right.double()).norm()) <= tolerance * float(right.double().norm())


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_optimal_brain_surgeon_column_by_column(kind, damping, n, m):
    weight, gram = gaussian(ROWS, COLUMNS, dtype=torch.float64), gram_of(kind)
    mask, pruned = sparsegpt(weight, Problem(gram, damping), NMPattern(n, m))
    expected_mask, expected = loop_sparsegpt(weight, gram, n, m, damping)
    alive = gram.diagonal() > 0  # which of several dead inputs is kept is open
    assert torch.equal(mask[:, alive], expected_mask[:, alive])
    assert close(pruned, expected, allowed(gram, damping))


@checked
@given(st.sampled_from(PATTERNS), st.sampled_from(KINDS[:-1]), st.integers(0, 2**32 - 1))
def test_it_is_so_for_any_weight(legal, kind, seed):
    weight, gram = gaussian(2, COLUMNS, seed=seed, dtype=torch.float64), gram_of(kind)
    _, pruned = sparsegpt(weight, Problem(gram), NMPattern(*legal))
    assert close(pruned, loop_sparsegpt(weight, gram, *legal, 0.01)[1], allowed(gram, 0.01))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_follows_float64(kind):
    weight, gram = gaussian(ROWS, COLUMNS), gram_of(kind).float()
    mask, pruned = sparsegpt(weight, Problem(gram), NMPattern(2, 4))
    assert pruned.dtype == torch.float32
    expected_mask, expected = loop_sparsegpt(weight, gram, 2, 4, 0.01)
    alive = gram.diagonal() > 0  # among equal saliencies any may be kept
    assert torch.equal(mask[:, alive], expected_mask[:, alive])
    # The factor is that of float64, rounded: the condition does not count, only what a row adds up in COLUMNS steps.
    # One step stretches an error by at most the condition of the factor, the root of that of H.
    stretch = float(torch.linalg.cond(damped_hessian(gram, 0.01))) ** 0.5
    assert close(pruned, expected, COLUMNS * torch.finfo(torch.float32).eps * stretch)


@pytest.mark.parametrize("kind", ["duplicate inputs", "few tokens"])
def test_a_damping_that_float32_would_lose_is_not_lost(kind):
    # At this damping the factor has no digit in float32, whose eps times the condition is above 1.
    weight, gram = gaussian(ROWS, COLUMNS, dtype=torch.float64), gram_of(kind)
    assert allowed(gram, 1e-8, torch.finfo(torch.float32).eps) > COLUMNS**2
    _, pruned = sparsegpt(weight, Problem(gram, 1e-8), NMPattern(2, 4))
    assert close(pruned, loop_sparsegpt(weight, gram, 2, 4, 1e-8)[1], allowed(gram, 1e-8))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 20, 47, 48, 1000])
def test_the_block_size_makes_no_difference(block_size, n, m):
    weight, gram = gaussian(ROWS, COLUMNS, dtype=torch.float64), gram_of("correlated")
    mask, pruned = sparsegpt(weight, Problem(gram), NMPattern(n, m))
    other_mask, other = sparsegpt(weight, Problem(gram), NMPattern(n, m), block_size=block_size)
    assert torch.equal(other_mask, mask)
    assert close(other, pruned, allowed(gram, 0.01))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_legal_and_the_weight_zero_off_it(kind, dtype, n, m):
    mask, pruned = sparsegpt(gaussian(ROWS, COLUMNS, dtype=dtype), Problem(gram_of(kind).to(dtype)), NMPattern(n, m))
    assert is_legal(mask, n, m)
    assert mask.dtype == torch.bool
    assert torch.isfinite(pruned).all()
    assert not pruned[~mask].any()


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_dead_inputs_weigh_nothing_and_are_kept_last(n, m):
    gram = gram_of("dead inputs")
    mask, pruned = sparsegpt(gaussian(ROWS, COLUMNS), Problem(gram.float()), NMPattern(n, m))
    alive = gram.diagonal() > 0
    assert not pruned[:, ~alive].any()
    live = alive.unflatten(0, (-1, m)).sum(1)
    assert torch.equal((mask & alive).unflatten(1, (-1, m)).sum(2), live.clamp(max=n).expand(ROWS, -1))


def test_inputs_that_do_not_overlap_are_pruned_by_size():
    weight, gram = gaussian(ROWS, COLUMNS), torch.rand(COLUMNS).diag()
    mask, pruned = sparsegpt(weight, Problem(gram, 1e-12), NMPattern(2, 4))
    assert torch.equal(mask, loop_topn(loop_wanda(weight, gram.diagonal().sqrt()), 2, 4))
    assert torch.equal(pruned, weight * mask)


@checked
@given(
    st.sampled_from(PATTERNS), st.sampled_from(["correlated", "few tokens", "duplicate inputs"]), st.integers(0, 999)
)
def test_it_loses_less_than_masks_without_an_update(legal, kind, seed):
    weight, gram = gaussian(32, COLUMNS, seed=seed), gram_of(kind, seed).float()
    _, pruned = sparsegpt(weight, Problem(gram), NMPattern(*legal))
    for score in (weight.abs(), loop_wanda(weight, gram.diagonal().sqrt())):
        masked = weight * loop_topn(score, *legal)
        assert relative_error(weight, pruned, gram) < relative_error(weight, masked, gram)


def test_a_transposed_weight_is_taken():
    weight, gram = gaussian(COLUMNS, ROWS, dtype=torch.float64), gram_of("correlated")
    mask, pruned = sparsegpt(weight.t(), Problem(gram), NMPattern(2, 4))
    other_mask, other = sparsegpt(weight.t().contiguous(), Problem(gram), NMPattern(2, 4))
    assert torch.equal(mask, other_mask)
    assert close(pruned, other, allowed(gram, 0.01))


def test_what_is_given_is_left_alone():
    given = gaussian(ROWS, COLUMNS), gram_of("dead inputs").float()
    before = [tensor.clone() for tensor in given]
    sparsegpt(given[0], Problem(given[1]), NMPattern(2, 4))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_no_rows_give_no_rows():
    mask, pruned = sparsegpt(torch.zeros(0, 8), Problem(torch.eye(8)), NMPattern(2, 4))
    assert mask.shape == pruned.shape == (0, 8)


@pytest.mark.parametrize(("weight", "gram"), [((6, 8), (4, 4)), ((6, 8), (8,)), ((6, 8), (8, 6)), ((8,), (8, 8))])
def test_shapes_that_do_not_fit_are_refused(weight, gram):
    with pytest.raises(ShapeError, match=r"do not belong together; weight and mask must be \(out, in\)"):
        sparsegpt(torch.ones(weight), Problem(torch.ones(gram)), NMPattern(2, 4))


def test_columns_that_are_no_multiple_of_m_are_refused():
    with pytest.raises(ShapeError, match="weight has in=6, which is not a multiple of m=4"):
        sparsegpt(torch.ones(2, 6), Problem(torch.eye(6)), NMPattern(2, 4))


def test_a_block_of_no_columns_is_refused():
    with pytest.raises(ConfigError, match="block_size=0 is not a number of columns; use 1 or more"):
        sparsegpt(torch.ones(2, 8), Problem(torch.eye(8)), NMPattern(2, 4), block_size=0)


@pytest.mark.parametrize("gram", [torch.ones(8, 8), torch.eye(8) - 1, torch.full((8, 8), torch.nan)])
def test_a_gram_matrix_without_a_factor_is_refused(gram):
    # Eight times the same input and no damping; a matrix with a negative eigenvalue; NaN.
    with pytest.raises(NumericalError, match=r"cannot be factorised with damping=0.0: .* raise `damping`"):
        sparsegpt(torch.ones(2, 8), Problem(gram, 0.0), NMPattern(2, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_weight_is_refused(bad):
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(NumericalError, match="weight holds NaN or infinite values"):
        sparsegpt(weight, Problem(torch.eye(8)), NMPattern(2, 4))
