"""Integers for values: what is stored, to the bit, and what is read of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import checked, gaussian

from optimum_eggs import NMPattern
from optimum_eggs.errors import ConfigError
from optimum_eggs.packing.codes import (
    Coding,
    decode,
    nearest_codes,
    read_codes,
    store_codes,
    straight_through,
    whole_range,
)


@checked
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_codes_come_back(kind, rows, columns, seed):
    coding = Coding(kind)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(coding.lowest, -coding.lowest, (rows, columns), generator=draw).to(torch.int8)
    stored = store_codes(codes, coding)
    assert stored.dtype == coding.dtype
    assert stored.shape == (rows, coding.width(columns))
    assert torch.equal(read_codes(stored, columns, coding), codes)


def test_the_layout_of_four_bits_by_hand():
    codes = torch.tensor([[-8, 7, 0, 3]], dtype=torch.int8)
    assert store_codes(codes, Coding("int4")).tolist() == [[0x0 | 0xF << 4, 0x8 | 0xB << 4]]


def test_a_scale_is_that_of_the_group_of_the_values_own_input():
    # 2:4 with a scale for every 64 inputs: 32 values share one, and the last group has fewer.
    coding, pattern = Coding("int8", 64), NMPattern(2, 4)
    codes = torch.ones(1, 40, dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    values = decode(codes, scale, 40, coding, coding.per_scale(pattern), torch.float32)
    assert values.tolist() == [[0.5] * 32 + [2.0] * 8]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_nearest_code_is_at_most_half_a_step_away(kind):
    coding, values = Coding(kind, 64), gaussian(7, 200)
    scale = whole_range(values, coding, 64)
    codes = nearest_codes(values, scale.float(), coding, 64)
    found = decode(store_codes(codes, coding), scale, 200, coding, 64, torch.float32)
    step = scale.float().repeat_interleave(64, 1)[:, :200]
    # a scale is rounded to bfloat16, so the largest value may lie up to 1/256 of itself beyond the highest code
    assert bool(((found - values).abs() <= step * (0.5 - coding.lowest / 256)).all())


def test_a_group_of_zeros_stays_one():
    values = torch.zeros(2, 64)
    coding = Coding("int4", 64)
    codes = nearest_codes(values, whole_range(values, coding, 64).float(), coding, 64)
    assert not bool(codes.any())


def test_the_gradient_goes_straight_through_but_not_beyond_the_range():
    values = torch.tensor([[0.3, -0.9, 100.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    found = straight_through(values, scale, Coding("int4", 64), 64)
    assert found.tolist() == [[0.5, -1.0, 3.5]]
    found.sum().backward()
    assert values.grad.tolist() == [[1.0, 1.0, 0.0]]
    # of a step: code - value/scale within the range, the highest code beyond it (Esser et al. 2020, eq. 3)
    assert scale.grad.item() == pytest.approx((1 - 0.6) + (-2 + 1.8) + 7)


@pytest.mark.parametrize(
    "text", ["int8", "int8:", "int8:x", "int9:64", "int8:63", "int8:0", "int8:131072", "", None, 3]
)
def test_what_is_no_coding_is_refused(text):
    with pytest.raises(ConfigError, match=r"coding=|values=|value_group="):
        Coding.parse(text)
