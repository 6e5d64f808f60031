import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked, gaussian, generator, loop_topn, random_mask, total, whole_numbers

from optimum_eggs.errors import NumericalError, ShapeError
from optimum_eggs.masks import permutation
from optimum_eggs.masks.permutation import channel_order, kept_score
from optimum_eggs.pattern import NMPattern

SEEDS = st.integers(0, 2**32 - 1)


def groupings(inputs, m):
    """Every way to cut a list into sets of m."""
    if not inputs:
        yield []
        return
    first, *rest = inputs
    for others in itertools.combinations(rest, m - 1):
        for further in groupings([k for k in rest if k not in others], m):
            yield [first, *others, *further]


def best_total(score, pattern):
    """What the best of all groupings keeps."""
    orders = torch.tensor(list(groupings(list(range(score.shape[1])), pattern.m)))
    kept = score[:, orders].unflatten(2, (-1, pattern.m)).topk(pattern.n, dim=-1).values  # (out, orders, groups, n)
    return float(kept.sum((0, 2, 3)).max())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8)])
def test_kept_score_is_what_the_mask_keeps(n, m):
    score = whole_numbers(5, 4 * m, 100)
    assert kept_score(score, NMPattern(n, m)) == total(score, loop_topn(score, n, m))


@checked
@given(st.sampled_from(PATTERNS), st.integers(1, 4), st.integers(0, 6), st.sampled_from([2, 1000]), SEEDS)
def test_the_order_is_a_permutation_and_never_keeps_less(legal, groups, rows, below, seed):
    pattern = NMPattern(*legal)
    score = whole_numbers(rows, groups * pattern.m, below, seed) - 1  # some below zero
    order = channel_order(score, pattern)
    identity = torch.arange(score.shape[1])
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, identity)
    gain = kept_score(score[:, order], pattern) - kept_score(score, pattern)
    assert gain > 0 or (gain == 0 and torch.equal(order, identity))


@pytest.mark.parametrize(("n", "m", "inputs"), [(1, 2, 8), (2, 4, 8), (1, 4, 12), (3, 4, 12)])
def test_most_of_what_the_best_grouping_gains(n, m, inputs):
    pattern = NMPattern(n, m)
    found = possible = 0.0
    for seed in range(20):
        score = whole_numbers(6, inputs, 1000, seed)
        before, best = kept_score(score, pattern), best_total(score, pattern)
        after = kept_score(score[:, channel_order(score, pattern)], pattern)
        assert before <= after <= best
        found, possible = found + after - before, possible + best - before
    assert found > 0.8 * possible


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_inputs_that_are_always_strong_are_spread(n, m):
    # Strong inputs all lie together, and there are just as many as can be kept.
    groups = 6
    strong = torch.arange(groups * m) < groups * n
    score = whole_numbers(7, groups * m, 100) + 1000 * strong
    order = channel_order(score, NMPattern(n, m))
    assert strong[order].unflatten(0, (groups, m)).sum(1).eq(n).all()
    assert kept_score(score[:, order], NMPattern(n, m)) == float(score[:, strong].sum())


def test_inputs_that_are_strong_in_turns_are_brought_together():
    # A legal mask with its inputs shuffled: all of it can be kept, if complementary inputs find each other.
    score = random_mask(100, 64, 1, 2).double()[:, torch.randperm(64, generator=generator(1))]
    assert kept_score(score, NMPattern(1, 2)) < 0.8 * score.sum()
    assert kept_score(score[:, channel_order(score, NMPattern(1, 2))], NMPattern(1, 2)) == score.sum()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (5, 8)])
def test_no_other_way_to_give_the_inputs_back_keeps_more(n, m):
    pattern, groups = NMPattern(n, m), torch.randperm(5 * m, generator=generator(0)).view(5, m)
    score = whole_numbers(6, 5 * m, 1000)
    for position in range(m):
        ways = []
        for given_back in itertools.permutations(groups[:, position].tolist()):
            other = groups.clone()
            other[:, position] = torch.tensor(given_back)
            ways.append(kept_score(score[:, other.flatten()], pattern))
        groups[:, position] = permutation._reassigned(score.t().contiguous(), groups, position, n)
        assert kept_score(score[:, groups.flatten()], pattern) == max(ways)


@pytest.mark.parametrize("together", [1, 5, 24])
def test_groups_that_are_dealt_with_in_parts_gain_nearly_as_much(together, monkeypatch):
    score, pattern = gaussian(32, 96).abs(), NMPattern(2, 4)
    whole = kept_score(score[:, channel_order(score, pattern)], pattern)
    monkeypatch.setattr(permutation, "_TOGETHER", together)
    order = channel_order(score, pattern)
    assert torch.equal(order.sort().values, torch.arange(96))
    before, after = kept_score(score, pattern), kept_score(score[:, order], pattern)
    assert after >= before + (0.5 if together > 1 else 0) * (whole - before)


def test_gains_are_near_and_exact_where_levels_are_met():
    score, threshold = gaussian(40, 30).abs(), gaussian(20, 30, seed=1).abs()
    exact = (score[None] - threshold[:, None]).clamp_min(0).sum(-1)
    assert (permutation._gains(score, threshold) - exact).abs().max() < 0.05 * exact.mean()
    torch.testing.assert_close(permutation._gains(score, threshold[:2]), exact[:2])  # lowest and highest level


def test_more_rounds_never_keep_less():
    score, pattern = gaussian(32, 96).abs(), NMPattern(2, 4)
    kept = [kept_score(score[:, channel_order(score, pattern, rounds)], pattern) for rounds in range(6)]
    assert kept == sorted(kept)
    assert kept[-1] > kept[1] > kept[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_stride_gives_the_same_order_again(dtype):
    score = gaussian(24, 64).abs().to(dtype)
    torch.manual_seed(1)  # the order does not depend on the global generator, nor moves it
    state = torch.get_rng_state()
    order = channel_order(score, NMPattern(2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order, channel_order(score.t().contiguous().t(), NMPattern(2, 4)))
    assert kept_score(score[:, order], NMPattern(2, 4)) > kept_score(score, NMPattern(2, 4))


@pytest.mark.parametrize("shape", [(3, 4), (0, 8), (2, 0)])
def test_nothing_to_reorder(shape):
    assert torch.equal(channel_order(torch.rand(shape), NMPattern(2, 4)), torch.arange(shape[1]))


def test_bad_scores():
    with pytest.raises(ShapeError, match="in=6, which is not a multiple of m=4"):
        channel_order(torch.rand(2, 6), NMPattern(2, 4))
    with pytest.raises(NumericalError, match="score holds NaN"):
        channel_order(torch.full((2, 8), torch.nan), NMPattern(2, 4))
