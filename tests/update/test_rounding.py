"""Rounding under a mask: legal, and no worse than what it begins with."""

import itertools

import pytest
import torch
from oracles import gaussian, random_mask
from problems import KINDS, layer

from optimum_eggs.packing.codes import Coding
from optimum_eggs.update import Problem
from optimum_eggs.update.rounding import nearest, round_values, spread


def problem_of(kind, rows=16, columns=None):
    weight, gram = layer(kind, rows)
    weight, gram = weight.float(), gram.float()
    mask = random_mask(rows, weight.shape[1], 2, 4)
    return weight * mask, mask, Problem(gram, 0.01)


def error_of(weight, values, problem):
    difference = (weight - values).double()
    gram = problem.gram.double() + float(problem.shift) * torch.eye(len(problem.gram), dtype=torch.float64)
    return ((difference @ gram) * difference).sum(1)


def values_of(codes, scale, coding):
    return codes.float() * spread(scale.float(), codes.shape[1], coding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_passing_errors_on_is_better_than_rounding_each_by_itself(kind, values):
    weight, mask, problem = problem_of(kind)
    coding = Coding(values, 64)
    plain = error_of(weight, values_of(*nearest(weight, coding), coding), problem)
    codes, scale = round_values(weight, weight, mask, problem, coding)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    assert not bool(codes[~mask].any())
    assert int(codes.min()) >= coding.lowest
    assert int(codes.max()) <= -(coding.lowest + 1)
    found = error_of(weight, values_of(codes, scale, coding), problem)
    assert float(found.sum()) < float(plain.sum())


def test_sweeps_end_where_no_single_code_can_be_better():
    weight, mask, problem = problem_of("correlated", rows=4)
    coding = Coding("int4", 64)
    codes, scale = round_values(weight, weight, mask, problem, coding, rounds=6, sweeps=20)
    best = error_of(weight, values_of(codes, scale, coding), problem)
    for row, column, step in itertools.product(range(4), range(weight.shape[1]), (-1, 1)):
        if not mask[row, column] or not coding.lowest <= int(codes[row, column]) + step <= -(coding.lowest + 1):
            continue
        other = codes.clone()
        other[row, column] += step
        found = error_of(weight, values_of(other, scale, coding), problem)
        assert float(found[row]) >= float(best[row]) * (1 - 1e-4)


def test_rows_are_rounded_alone():
    weight, mask, problem = problem_of("random")
    coding = Coding("int4", 64)
    codes, scale = round_values(weight, weight, mask, problem, coding)
    part = round_values(weight[4:9], weight[4:9], mask[4:9], problem, coding)
    assert torch.equal(part[0], codes[4:9])
    assert torch.equal(part[1], scale[4:9])


def test_rows_of_zeros_stay_zeros():
    weight, mask, problem = problem_of("random")
    weight[3] = 0
    codes, _ = round_values(weight, weight, mask, problem, Coding("int4", 64))
    assert not bool(codes[3].any())


def test_more_than_one_group_in_a_row():
    x = gaussian(160, 400, seed=3)
    problem = Problem(x @ x.t(), 0.01)
    weight, mask = gaussian(8, 160), random_mask(8, 160, 2, 4)
    coding = Coding("int4", 64)
    codes, scale = round_values(weight * mask, weight * mask, mask, problem, coding)
    assert scale.shape == (8, 3)
    plain = error_of(weight * mask, values_of(*nearest(weight * mask, coding), coding), problem)
    assert float(error_of(weight * mask, values_of(codes, scale, coding), problem).sum()) < 0.8 * float(plain.sum())
