"""Several layers of the same inputs as one operation: equal to each by itself, wherever their weights lie."""

import pytest
import torch
from oracles import gaussian
from products import CASES, DTYPES, OP, arguments, has_kernels
from torch.library import opcheck

from optimum_eggs.ops.select import dense_kernel

ALL = torch.ops.optimum_eggs.packed_linears
ROWS = (40, 8, 24)


def layers(case, count, dtype=torch.float32, bias=True, apart=False):
    """What is stored of each: the parts of one matrix, or copies of them."""
    given = arguments(case, rows=sum(ROWS[:count]), dtype=dtype, bias=bias)
    split = [[None] * count if each is None else each.split(ROWS[:count]) for each in given[:4]]
    if apart:
        split = [[None if part is None else part.clone() for part in parts] for parts in split]
    return list(zip(*split, strict=True)), given[4:]


def joint(x, stored, numbers):
    absent = [(None,) * 4] * (3 - len(stored))
    return ALL(x, *(part for parts in zip(*stored, *absent, strict=True) for part in parts), *numbers)


def single(x, stored, numbers):
    return torch.cat([OP(x, *layer, *numbers) for layer in stored], -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_the_operation_is_well_formed(case, count):
    stored, numbers = layers(case, count)
    absent = [(None,) * 4] * (3 - count)
    parts = [part for parts in zip(*stored, *absent, strict=True) for part in parts]
    opcheck(ALL.default, (gaussian(2, 3, 192), *parts, *numbers))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
def test_it_gives_what_each_gives(case, dtype, apart):
    for count, bias in ((2, False), (3, True)):
        stored, numbers = layers(case, count, dtype, bias, apart)
        for shape in ((192,), (1, 1, 192), (8, 192), (2, 3, 2, 192), (700, 192), (0, 192)):
            x = gaussian(*shape, dtype=dtype)
            found, expected = joint(x, stored, numbers), single(x, stored, numbers)
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the same sums, in blocks of other rows


@pytest.mark.parametrize("case", CASES)
def test_neighbours_and_others_are_told_apart(case):
    """Of three: the last elsewhere, the first elsewhere, in another order, a bias missing, a bias elsewhere."""
    stored, numbers = layers(case, 3)
    away, _ = layers(case, 3, apart=True)
    for chosen in (
        [stored[0], stored[1], away[2]],
        [away[0], stored[1], stored[2]],
        [stored[1], stored[0], stored[2]],
        [stored[0], (*stored[1][:3], None), stored[2]],
        [stored[0], (*stored[1][:3], away[1][3]), stored[2]],
        [stored[0], stored[0], stored[0]],
    ):
        for tokens in (1, 3):
            x = gaussian(tokens, 192)
            torch.testing.assert_close(joint(x, chosen, numbers), single(x, chosen, numbers), rtol=1e-5, atol=1e-5)


@has_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("apart", [False, True])
def test_its_own_kernel_runs(case, apart):
    if case == "dense" and None in {dense_kernel(torch.bfloat16, torch.device("cpu"), tokens) for tokens in (1, 2)}:
        pytest.skip("torch multiplies so few tokens faster on this processor")

    def called(tokens):
        with torch.profiler.profile(acc_events=True) as profile:  # which torch 2.12 warns without
            joint(gaussian(tokens, 192, dtype=torch.bfloat16), *layers(case, 3, torch.bfloat16, apart=apart))
        return {event.name for event in profile.events() if event.name.startswith("optimum_eggs::")}

    assert called(1) == called(2) == {"optimum_eggs::packed_linears"}
    assert "optimum_eggs::packed_linear" in called(2000) or case == "packed"  # which a kernel may take of any number


@pytest.mark.parametrize("which", range(3))
def test_what_does_not_belong_together_is_an_error(which):
    x = gaussian(1, 192)
    for case, place, wrong in (
        ("packed", 0, lambda t: t[:, :-2].contiguous()),
        ("packed", 2, lambda t: t[:, :-1].contiguous()),
        ("packed", 2, lambda t: None),
        ("packed", 3, lambda t: t[:-1]),
        ("int4", 0, lambda t: t[:, :-1].contiguous()),
        ("int8", 1, lambda t: t[:, :-1].contiguous()),
    ):
        stored, numbers = layers(case, 3)
        layer = list(stored[which])
        layer[place] = wrong(layer[place])
        stored[which] = tuple(layer)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            joint(x, stored, numbers)
