import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked, gaussian, loop_pack, random_mask, same_bits

from optimum_eggs.errors import ShapeError
from optimum_eggs.packing import meta_width, pack, pack_mask, packed_width, unpack, unpack_mask
from optimum_eggs.pattern import NMPattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = st.integers(0, 2**32 - 1)
TWO_OF_FOUR = NMPattern(2, 4)


@st.composite
def layers(draw):
    """A weight with zeros of both signs, a legal mask and their pattern; in is often not a multiple of 8."""
    n, m = draw(st.sampled_from(PATTERNS))
    rows, columns, seed = draw(st.integers(1, 5)), m * draw(st.integers(1, 5)), draw(SEEDS)
    weight = gaussian(rows, columns, seed=seed, dtype=draw(st.sampled_from(DTYPES)))
    weight[gaussian(rows, columns, seed=seed + 1) > 1] = 0.0
    weight[gaussian(rows, columns, seed=seed + 2) > 1] = -0.0
    return weight, random_mask(rows, columns, n, m, seed), NMPattern(n, m)


@checked
@given(layers())
def test_values_and_bits_are_those_of_a_loop(layer):
    weight, mask, pattern = layer
    values, meta = pack(weight, mask, pattern)
    expected_values, expected_meta = loop_pack(weight, mask)
    assert same_bits(values, expected_values)
    assert torch.equal(meta, expected_meta)
    assert meta.dtype == torch.uint8


@checked
@given(layers())
def test_what_is_kept_comes_back_bit_for_bit(layer):
    weight, mask, pattern = layer
    again = unpack(*pack(weight, mask, pattern), pattern)
    assert same_bits(again, torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)))


@checked
@given(layers())
def test_the_mask_comes_back_where_zeros_are_kept(layer):
    weight, mask, pattern = layer
    _, meta = pack(torch.zeros_like(weight), mask, pattern)
    assert torch.equal(unpack_mask(meta, weight.shape[1]), mask)


@checked
@given(layers())
def test_transposed_tensors_pack_the_same(layer):
    weight, mask, pattern = layer
    columns_first = [tensor.t().contiguous().t() for tensor in (weight, mask)]
    for found, expected in zip(pack(*columns_first, pattern), pack(weight, mask, pattern), strict=True):
        assert torch.equal(found, expected)


def test_the_sign_of_a_kept_zero_survives():
    weight = torch.tensor([[-0.0, 0.0, 5.0, 6.0]])
    values, meta = pack(weight, torch.tensor([[True, True, False, False]]), TWO_OF_FOUR)
    assert torch.signbit(values).tolist() == [[True, False]]
    assert torch.signbit(unpack(values, meta, TWO_OF_FOUR)).tolist() == [[True, False, False, False]]


def test_what_lies_off_the_mask_is_dropped():
    weight = torch.tensor([[1.0, float("nan"), float("inf"), 4.0]])
    values, meta = pack(weight, torch.tensor([[True, False, False, True]]), TWO_OF_FOUR)
    assert unpack(values, meta, TWO_OF_FOUR).tolist() == [[1, 0, 0, 4]]


def test_position_is_bit_within_byte_lowest_first():
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 3, 7, 8, 11]] = True
    assert pack_mask(mask).tolist() == [[0b10001001, 0b00001001]]


def test_bits_beyond_the_last_input_are_zero():
    meta = pack_mask(torch.ones(2, 12, dtype=torch.bool))
    assert meta.tolist() == [[255, 15]] * 2


@pytest.mark.parametrize("columns", [8, 64, 4096])
def test_two_of_four_in_bfloat16_takes_nine_sixteenths(columns):
    weight = gaussian(3, columns, dtype=torch.bfloat16)
    values, meta = pack(weight, random_mask(3, columns, 2, 4), TWO_OF_FOUR)
    assert (values.nbytes + meta.nbytes) * 16 == weight.nbytes * 9


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_widths_are_those_of_the_tensors(n, m):
    values, meta = pack(gaussian(1, 3 * m), random_mask(1, 3 * m, n, m), NMPattern(n, m))
    assert values.shape == (1, packed_width(3 * m, NMPattern(n, m))) == (1, 3 * n)
    assert meta.shape == (1, meta_width(3 * m))


def test_gradients_reach_the_values_kept():
    mask = random_mask(3, 8, 2, 4)
    values, meta = pack(gaussian(3, 8), mask, TWO_OF_FOUR)
    slope = gaussian(3, 8, seed=1)
    values.requires_grad_()
    (unpack(values, meta, TWO_OF_FOUR) * slope).sum().backward()
    assert torch.equal(values.grad, slope[mask].view(3, 4))


def test_no_rows_pack_to_no_rows():
    values, meta = pack(torch.zeros(0, 12), torch.zeros(0, 12, dtype=torch.bool), TWO_OF_FOUR)
    assert (values.shape, meta.shape, unpack(values, meta, TWO_OF_FOUR).shape) == ((0, 6), (0, 2), (0, 12))


def mask_with(kept):
    mask = random_mask(3, 8, 2, 4)
    mask[1, 4:] = torch.arange(4) < kept
    return mask


@pytest.mark.parametrize(
    ("weight", "mask", "message"),
    [
        (torch.ones(3, 8), mask_with(3), r"mask keeps 3 of the 4 positions of row 1, group 1; 2:4 keeps exactly 2"),
        (torch.ones(3, 8), mask_with(0), r"mask keeps 0 of the 4 positions of row 1, group 1"),
        (torch.ones(3, 4), mask_with(2), r"weight \(3, 4\) and mask \(3, 8\) must both be \(out, in\)"),
        (torch.ones(8), mask_with(2)[0], r"weight \(8,\) and mask \(8,\) must both be \(out, in\)"),
        (torch.ones(3, 6), mask_with(2)[:, :6], r"in_features=6 is not a positive multiple of m=4"),
        (torch.ones(3, 0), mask_with(2)[:, :0], r"in_features=0 is not a positive multiple of m=4"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_reason(weight, mask, message):
    with pytest.raises(ShapeError, match=message):
        pack(weight, mask, TWO_OF_FOUR)
