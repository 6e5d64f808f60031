from __future__ import annotations

import pytest
import torch
from oracles import gaussian, random_mask

from optimum_eggs import NMPattern
from optimum_eggs.masks import nonzero_mask, tightest_pattern
from optimum_eggs.masks.recognise import USUAL, follows


def pruned(pattern, rows=64, columns=256, seed=0):
    pattern = NMPattern.parse(pattern)
    return gaussian(rows, columns, seed=seed) * random_mask(rows, columns, pattern.n, pattern.m, seed=seed + 1)


@pytest.mark.parametrize("pattern", USUAL, ids=str)
def test_every_usual_pattern_is_recognised_as_itself(pattern):
    assert tightest_pattern(pruned(pattern)) == pattern


def test_of_equal_density_the_smaller_group_is_tighter():
    weight = pruned("2:4")
    assert all(follows(weight, NMPattern.parse(loose)) for loose in ("2:4", "4:8", "8:16", "3:4", "6:8"))
    assert tightest_pattern(weight) == NMPattern(2, 4)


@pytest.mark.parametrize("weight", [gaussian(64, 256), pruned("2:4")[:, :254].contiguous(), pruned("7:8")])
def test_what_is_not_n_of_m_is_not_recognised(weight):
    assert tightest_pattern(weight) is None


def test_one_group_with_too_many_is_enough():
    weight = pruned("2:4")
    weight[5, 8:11] = 1.0
    assert not follows(weight, NMPattern(2, 4))
    assert tightest_pattern(weight) != NMPattern(2, 4)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "20:32"])
def test_the_mask_holds_every_nonzero_and_fills_up_with_the_first_zeros(pattern):
    pattern = NMPattern.parse(pattern)
    weight = pruned(pattern) + 0.0  # which takes the signs of zeros away
    weight[:, ::7] = 0
    mask = nonzero_mask(weight, pattern)
    assert bool((mask | (weight == 0)).all())
    assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    expected = weight != 0
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], pattern.m):
            group = expected[row, start : start + pattern.m]
            for place in range(pattern.m):
                if int(group.sum()) < pattern.n:
                    group[place] = True
    assert torch.equal(mask, expected)


def test_zeros_with_a_sign_are_taken_in_first():
    # What a mask that is multiplied leaves of a negative weight; among the kept ones its sign stays.
    weight = torch.tensor([[0.0, -0.0, 3.0, 0.0]])
    assert nonzero_mask(weight, NMPattern(2, 4)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_smallest_values_count(dtype):
    weight = torch.zeros(1, 8, dtype=dtype)
    weight[0, 3] = torch.finfo(dtype).smallest_normal / 2  # subnormal
    assert bool(nonzero_mask(weight, NMPattern(1, 8))[0, 3])
