import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    all_legal_tiles,
    checked,
    cut,
    gaussian,
    is_legal,
    loop_floor,
    loop_topn,
    loop_wanda,
    random_mask,
    whole_numbers,
)
from problems import inputs

from optimum_eggs.errors import ConfigError, NumericalError, ShapeError
from optimum_eggs.masks import expander_mask, swap
from optimum_eggs.masks.swap import swap_mask
from optimum_eggs.pattern import NMPattern

SEEDS = st.integers(0, 2**32 - 1)
PATTERNS = [(2, 4), (4, 8), (1, 4), (6, 8), (1, 2)]
KINDS = ["random", "correlated", "dead inputs", "duplicate inputs", "few tokens", "one large input", "no input"]


def whole_problem(rows, columns, seed=0):
    """A weight and a Gram matrix of integers, in float64: whatever is computed from them is exact."""
    x = whole_numbers(columns, 3 * columns, 21, seed=seed) - 9  # the mean makes inputs depend on each other
    return whole_numbers(rows, columns, 2001, seed=seed + 1) - 1000, x @ x.T


def floored_mask(rows, columns, n, m, min_degree, band, seed=0):
    return expander_mask(whole_numbers(rows, columns, 1000, seed=seed), NMPattern(n, m), min_degree, band)


def losses(weight, mask, gram):
    """‖(w − w∘k)X‖² of every row, in float64."""
    lost = (weight * ~mask).double()
    return ((lost @ gram.double()) * lost).sum(1)


def row_swaps(weight, mask, gram, i, left, m):
    """Every swap in one group of one row: (change of the row's loss, column given up, column restored)."""
    row, kept = weight[i : i + 1], mask[i : i + 1]
    before = float(losses(row, kept, gram))
    for u, p in itertools.product(range(left, left + m), repeat=2):
        if kept[0, u] and not kept[0, p]:
            swapped = kept.clone()
            swapped[0, u], swapped[0, p] = False, True
            yield float(losses(row, swapped, gram)) - before, u, p


def loop_swap_round(weight, mask, gram, m, min_degree, band):
    """One round, swap by swap, each judged by the loss that it would lead to."""
    mask = mask.clone()
    for left in range(0, mask.shape[1], m):
        for start, stop in cut(len(mask), band):
            spare = {u: int(mask[start:stop, u].sum()) - min_degree for u in range(left, left + m)}
            wanted = []
            for i in range(start, stop):
                open_to_it = [s for s in row_swaps(weight, mask, gram, i, left, m) if s[0] < 0 and spare[s[1]]]
                wanted += [(*min(open_to_it), i)] if open_to_it else []
            for _, u, p, i in sorted(wanted):
                if spare[u]:
                    spare[u] -= 1
                    mask[i, u], mask[i, p] = False, True
    return mask


def improving_swaps(weight, mask, gram, m, min_degree, band):
    """Every single swap that the floor allows and that lowers the loss."""
    return [
        (i, u, p)
        for start, stop in cut(len(mask), band)
        for left in range(0, mask.shape[1], m)
        for i in range(start, stop)
        for change, u, p in row_swaps(weight, mask, gram, i, left, m)
        if change < 0 and int(mask[start:stop, u].sum()) > min_degree
    ]


@st.composite
def floors(draw):
    """n, m, min_degree, band, rows, seed: a floor that can hold, whole bands or not."""
    n, m = draw(st.sampled_from(PATTERNS))
    band = draw(st.integers(1, 6))
    min_degree = draw(st.integers(0, band * n // m))
    return n, m, min_degree, band, band + draw(st.integers(0, 8)), draw(SEEDS)


@checked
@given(floors())
def test_a_round_is_the_best_swap_of_every_row_group_after_group(floor):
    n, m, min_degree, band, rows, seed = floor
    weight, gram = whole_problem(rows, 2 * m, seed)
    mask = floored_mask(rows, 2 * m, n, m, min_degree, band, seed + 2)
    expected = mask
    for rounds in (1, 2):
        expected = loop_swap_round(weight, expected, gram, m, min_degree, band)
        assert torch.equal(swap_mask(weight, mask, gram, NMPattern(n, m), min_degree, band, rounds), expected)


@checked
@given(floors())
def test_every_round_loses_less_and_in_the_end_no_swap_would(floor):
    n, m, min_degree, band, rows, seed = floor
    weight, gram = whole_problem(rows, 2 * m, seed)
    mask, before = floored_mask(rows, 2 * m, n, m, min_degree, band, seed + 2), None
    for rounds in itertools.count(1):
        before, mask = mask, swap_mask(weight, mask, gram, NMPattern(n, m), min_degree, band, rounds=1)
        assert is_legal(mask, n, m)
        assert loop_floor(mask, band) >= min_degree
        if torch.equal(mask, before):
            break
        was, now = losses(weight, before, gram), losses(weight, mask, gram)
        changed = (mask != before).any(1)
        assert (now[changed] < was[changed]).all()  # integers: exact
        assert rounds < 100
    assert improving_swaps(weight, mask, gram, m, min_degree, band) == []


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("min_degree", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_no_round_loses_more(kind, dtype, min_degree, n, m):
    x = inputs(kind, 64)
    weight, gram, mask = gaussian(40, 64, dtype=dtype), (x @ x.T).to(dtype), floored_mask(40, 64, n, m, min_degree, 16)
    # Only the rounding of the loss itself, in float64, is allowed for: 64² terms, which may cancel.
    size = weight.double().abs()
    rounding = 64**2 * torch.finfo(torch.float64).eps * ((size @ gram.double().abs()) * size).sum(1)
    before = losses(weight, mask, gram)
    found = mask
    for _ in range(7):
        found = swap_mask(weight, found, gram, NMPattern(n, m), min_degree, 16, rounds=1)
        assert is_legal(found, n, m)
        assert loop_floor(found, 16) >= min_degree
        after = losses(weight, found, gram)
        assert (after <= before + rounding).all()
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_by_itself(kind, dtype):
    # Rounding must not let two swaps undo each other for ever.
    x = inputs(kind, 64)
    weight, gram, mask = gaussian(40, 64, dtype=dtype), (x @ x.T).to(dtype), floored_mask(40, 64, 2, 4, 1, 16)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4), 1, 16, rounds=10**9)
    assert torch.equal(swap_mask(weight, mask, gram, NMPattern(2, 4), 1, 16, rounds=100), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_swaps_that_gain_nothing_are_not_made(kind, dtype):
    # Inputs and weights in equal pairs: exchanging one of a pair for the other changes nothing but the rounding.
    x, weight = inputs(kind, 64), gaussian(40, 64, dtype=dtype)
    x[1::2], weight[:, 1::2] = x[::2], weight[:, ::2]
    gram, mask = (x @ x.T).to(dtype), random_mask(40, 64, 2, 4)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4), rounds=100)
    assert torch.equal(swap_mask(weight, mask, gram, NMPattern(2, 4), rounds=101), found)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_leaves_no_swap_that_gains_more_than_rounding(kind):
    x = inputs(kind, 64)
    weight, gram, mask = gaussian(8, 64), (x @ x.T).float(), floored_mask(8, 64, 2, 4, 1, 8)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4), 1, 8, rounds=100)
    # A gain is a sum of 4 products of a weight with an element of the gradient, which adds up 64 terms; none of them
    # is larger than the row's largest w² G. One rounding error for each term.
    largest = (weight.square() * gram.diagonal()).amax(1).tolist()
    for i, left in itertools.product(range(8), range(0, 64, 4)):
        for change, u, _ in row_swaps(weight, found, gram, i, left, 4):
            assert change >= -4 * 64 * torch.finfo(torch.float32).eps * largest[i] or int(found[:, u].sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_makes_no_difference(dtype):
    # Powers of two scale without rounding.
    x = inputs("correlated", 64)
    weight, gram, mask = gaussian(40, 64, dtype=dtype), (x @ x.T).to(dtype), floored_mask(40, 64, 2, 4, 1, 16)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4), 1)
    assert not torch.equal(found, mask)
    for unit in (2.0**-20, 2.0**20):
        assert torch.equal(swap_mask(weight * unit, mask, gram / unit, NMPattern(2, 4), 1), found)


@pytest.mark.parametrize("kind", ["random", "correlated", "duplicate inputs", "few tokens"])
def test_it_loses_less_than_wanda(kind):
    x = inputs(kind, 64)
    weight, gram = gaussian(40, 64), (x @ x.T).float()
    mask = loop_topn(loop_wanda(weight, gram.diagonal().sqrt()), 2, 4)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4))
    assert losses(weight, found, gram).sum() < losses(weight, mask, gram).sum()


def test_the_best_of_all_masks_stays():
    masks = torch.stack([torch.cat(pair, 1)[0] for pair in itertools.product(all_legal_tiles(2, 4, 1, 0), repeat=2)])
    assert len(masks) == 36
    for seed in range(20):
        weight, gram = whole_problem(1, 8, seed)
        best = masks[losses(weight.expand(36, 8), masks, gram).argmin()][None]
        assert torch.equal(swap_mask(weight, best, gram, NMPattern(2, 4)), best)


@pytest.mark.parametrize("min_degree", [1, 2])
def test_the_best_of_all_masks_under_the_floor_stays(min_degree):
    tiles = all_legal_tiles(2, 4, 4, min_degree)
    for seed in range(20):
        weight, gram = whole_problem(4, 4, seed)
        best = min(tiles, key=lambda tile: float(losses(weight, tile, gram).sum()))
        assert torch.equal(swap_mask(weight, best, gram, NMPattern(2, 4), min_degree, band=4), best)


def test_of_the_rows_that_drop_a_column_those_that_gain_most_do():
    # Row i gains (2 + i)² − 1 by column 1 in place of column 0, which six rows keep, four more than the floor.
    weight = torch.stack([torch.ones(8), torch.arange(2.0, 10)], 1)
    mask = torch.tensor([[False, True]] * 2 + [[True, False]] * 6)
    found = swap_mask(weight, mask, torch.eye(2), NMPattern(1, 2), min_degree=2, band=8)
    assert found[:, 0].tolist() == [False] * 2 + [True] * 2 + [False] * 4
    assert swap_mask(weight, mask, torch.eye(2), NMPattern(1, 2))[:, 1].all()


@pytest.mark.parametrize(("n", "m", "min_degree", "band"), [(2, 4, 8, 16), (1, 4, 1, 4), (6, 8, 3, 4)])
def test_where_every_column_is_at_the_floor_nothing_moves(n, m, min_degree, band):
    weight, gram = whole_problem(2 * band, 2 * m)
    mask = floored_mask(2 * band, 2 * m, n, m, min_degree, band)
    assert torch.equal(swap_mask(weight, mask, gram, NMPattern(n, m), min_degree, band), mask)
    assert not torch.equal(swap_mask(weight, mask, gram, NMPattern(n, m)), mask)


@pytest.mark.parametrize("block", [1, 8, 20, 48, 1000])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_block_of_columns_makes_no_difference(block, n, m, monkeypatch):
    weight, gram = whole_problem(20, 48)
    mask = random_mask(20, 48, n, m)
    found = swap_mask(weight, mask, gram, NMPattern(n, m), rounds=3)
    monkeypatch.setattr(swap, "_BLOCK", block)
    assert torch.equal(swap_mask(weight, mask, gram, NMPattern(n, m), rounds=3), found)


def test_no_rounds_are_a_copy_of_the_mask():
    weight, gram = whole_problem(8, 16)
    mask = random_mask(8, 16, 2, 4)
    found = swap_mask(weight, mask, gram, NMPattern(2, 4), rounds=0)
    assert torch.equal(found, mask)
    assert found.data_ptr() != mask.data_ptr()


def test_inputs_that_are_all_zero_leave_the_mask():
    mask = random_mask(8, 16, 2, 4)
    assert torch.equal(swap_mask(gaussian(8, 16), mask, torch.zeros(16, 16), NMPattern(2, 4)), mask)


def test_transposed_tensors_are_taken():
    weight, gram = whole_problem(20, 16)
    mask = random_mask(20, 16, 2, 4)
    found = swap_mask(weight.t().contiguous().t(), mask.t().contiguous().t(), gram, NMPattern(2, 4))
    assert torch.equal(found, swap_mask(weight, mask, gram, NMPattern(2, 4)))


def test_what_is_given_is_left_alone():
    given = (*whole_problem(40, 16), floored_mask(40, 16, 2, 4, 1, 16))
    weight, gram, mask = (tensor.clone() for tensor in given)
    assert not torch.equal(swap_mask(weight, mask, gram, NMPattern(2, 4), 1), mask)
    assert all(torch.equal(*pair) for pair in zip((weight, gram, mask), given, strict=True))


@pytest.mark.parametrize("min_degree", [0, 1])
def test_no_rows_give_no_rows(min_degree):
    mask = torch.zeros(0, 8, dtype=torch.bool)
    assert swap_mask(torch.zeros(0, 8), mask, torch.eye(8), NMPattern(2, 4), min_degree).shape == (0, 8)


def test_a_floor_that_the_mask_does_not_keep_is_refused():
    mask = random_mask(40, 8, 2, 4)
    mask[16:, :4] = torch.tensor([True, False, True, False])
    with pytest.raises(
        ConfigError,
        match=r"min_degree=1 does not hold in the mask: rows 16 to 39 keep 0 weights of input 1; pass the min_degree",
    ):
        swap_mask(torch.ones(40, 8), mask, torch.eye(8), NMPattern(2, 4), 1, 16)
    mask[20, :2] = torch.tensor([False, True])
    with pytest.raises(ConfigError, match=r"rows 16 to 39 keep 0 weights of input 3"):
        swap_mask(torch.ones(40, 8), mask, torch.eye(8), NMPattern(2, 4), 1, 16)


@pytest.mark.parametrize(
    ("min_degree", "band", "message"),
    [
        (3, 4, "min_degree=3 cannot hold at 2:4"),
        (-1, 16, "min_degree=-1 is negative"),
        (0, 0, "band=0 is not a number of rows"),
    ],
)
def test_a_floor_that_cannot_hold_is_refused(min_degree, band, message):
    with pytest.raises(ConfigError, match=message):
        swap_mask(torch.ones(8, 8), random_mask(8, 8, 2, 4), torch.eye(8), NMPattern(2, 4), min_degree, band)


@pytest.mark.parametrize(
    ("weight", "mask", "gram"),
    [((6, 8), (6, 4), (8, 8)), ((6, 8), (6, 8), (4, 4)), ((6, 8), (6, 8), (8,)), ((8,), (8,), (8, 8))],
)
def test_shapes_that_do_not_fit_are_refused(weight, mask, gram):
    with pytest.raises(
        ShapeError, match=r"do not belong together; they must be \(out, in\), \(out, in\) and \(in, in\)"
    ):
        swap_mask(torch.ones(weight), torch.ones(mask, dtype=torch.bool), torch.ones(gram), NMPattern(2, 4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 6, dtype=torch.bool), r"mask has in=6, which is not a multiple of m=4"),
        (torch.ones(2, 8), r"mask has dtype torch.float32; it must be torch.bool"),
        (torch.ones(2, 8, dtype=torch.bool), r"mask keeps 4 of the 4 positions of row 0, group 0; 2:4 keeps exactly 2"),
    ],
)
def test_a_mask_of_another_pattern_is_refused(mask, message):
    with pytest.raises(ShapeError, match=message):
        swap_mask(torch.ones(mask.shape), mask, torch.eye(mask.shape[1]), NMPattern(2, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_are_refused(bad):
    mask = random_mask(2, 8, 2, 4)
    for spoilt in (weights := torch.ones(2, 8), gram := torch.eye(8)):
        spoilt[1, 3] = bad
        with pytest.raises(NumericalError, match="weight or gram holds NaN or infinite values"):
            swap_mask(weights, mask, gram, NMPattern(2, 4))
        spoilt[1, 3] = 0
