"""The product with integers against plain arithmetic, on every kernel that this processor runs."""

import pytest
import torch
from oracles import coded_product, gaussian, random_mask
from torch.library import opcheck

from optimum_eggs.ops import force, held, native
from optimum_eggs.ops.coded_linear import coded_linear, values_of
from optimum_eggs.packing import pack_mask
from optimum_eggs.packing.codes import Coding, store_codes

PATTERNS = [(2, 4), (1, 4), (4, 8), (6, 8), (1, 2), (3, 16), (5, 32), (1, 1)]
CODED = [isa for isa in native.INSTRUCTION_SETS if isa not in ("avx512", "avx512_vbmi2")]
"""Sets with a kernel of their own; the others use the one before."""


def made(n, m, kind, rows=17, columns=192, group=64, dtype=torch.float32, seed=0):
    coding = Coding(kind, group)
    draw = torch.Generator().manual_seed(seed)
    width = columns // m * n
    codes = torch.randint(coding.lowest, -coding.lowest, (rows, width), generator=draw).to(torch.int8)
    scale = (torch.rand(rows, coding.scales(columns), generator=draw) * 0.01 + 0.001).bfloat16()
    meta = None if n == m else pack_mask(random_mask(rows, columns, n, m, seed))
    return store_codes(codes, coding), scale, meta, gaussian(rows, dtype=dtype, seed=seed + 1)


@pytest.mark.skipif(not native.INSTRUCTION_SETS, reason="no kernels were built")
@pytest.mark.parametrize("isa", CODED)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_kernels_round_the_inputs_and_multiply_exactly(isa, kind, n, m):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for tokens in (1, 2, 5, 8):
            codes, scale, meta, bias = made(n, m, kind, dtype=dtype)
            x = gaussian(tokens, 192, dtype=dtype)
            expected = coded_product(x, codes, scale, meta, bias, n, m, kind, 64)
            with force("native", isa):
                found = coded_linear(x, codes, scale, meta, bias, n, m, kind, 64)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not native.INSTRUCTION_SETS, reason="no kernels were built")
@pytest.mark.parametrize("isa", CODED)
def test_nothing_cancels_in_sums_of_a_few_codes_and_inputs_of_one_sign(isa):
    x, largest = gaussian(1, 8192).abs() + 1, 1e37
    codes, scale = torch.zeros(3, 8192, dtype=torch.int8), torch.ones(3, 64).bfloat16()
    codes[:, ::128] = 1
    expected = coded_product(x, codes, scale, None, None, 1, 1, "int8", 128)
    with force("native", isa):
        found = coded_linear(x, codes, scale, None, None, 1, 1, "int8", 128)
        far = coded_linear(torch.full((1, 8192), largest), codes, scale / 64, None, None, 1, 1, "int8", 128)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(far, torch.full((1, 3), largest), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_error_of_rounded_inputs_has_the_bound_that_is_stated(kind):
    codes, scale, meta, bias = made(2, 4, kind)
    x = gaussian(4, 192)
    exact = coded_linear(x.repeat(3, 1), codes, scale, meta, bias, 2, 4, kind, 64)[:4]
    found = coded_linear(x, codes, scale, meta, bias, 2, 4, kind, 64)
    values = values_of(codes, scale, 192, 2, 4, kind, 64, torch.float32).abs()
    size = values.view(17, 3, 32).sum(2)  # |w| of every group
    largest = x.abs().view(4, 3, 64).amax(2)
    assert bool(((found - exact).abs() <= largest @ size.t() / 254 + 1e-4).all())


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1)])
def test_many_tokens_are_multiplied_by_the_values(n, m, tokens):
    codes, scale, meta, bias = made(n, m, "int4")
    x = gaussian(tokens, 192)
    values = values_of(codes, scale, 192, n, m, "int4", 64, torch.float32)
    dense = values
    if meta is not None:
        dense = torch.zeros(17, 192).masked_scatter(random_mask(17, 192, n, m), values)
    found = coded_linear(x, codes, scale, meta, bias, n, m, "int4", 64)
    exact = tokens > 8
    tolerance = 1e-5 if exact else 0.02
    torch.testing.assert_close(found, x @ dense.t() + bias, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_the_input_is_that_of_the_values():
    codes, scale, meta, bias = made(2, 4, "int8")
    values = values_of(codes, scale, 192, 2, 4, "int8", 64, torch.float32)
    dense = torch.zeros(17, 192).masked_scatter(random_mask(17, 192, 2, 4), values)
    for tokens in (3, 20):
        x = gaussian(tokens, 192).requires_grad_()
        b = bias.clone().requires_grad_()
        y = coded_linear(x, codes, scale, meta, b, 2, 4, "int8", 64)
        weights = gaussian(*y.shape, seed=5)
        (y * weights).sum().backward()
        torch.testing.assert_close(x.grad, weights @ dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.grad, weights.sum(0))


def test_where_torch_unpacks_nothing_is_held(monkeypatch):
    monkeypatch.setattr(held, "hold", lambda *_: pytest.fail("held"))
    codes, scale, meta, _ = made(2, 4, "int8")
    values = values_of(codes, scale, 192, 2, 4, "int8", 64, torch.float64)
    x = gaussian(3, 192).double().requires_grad_()
    with force("dense"):
        y = coded_linear(x, codes, scale, meta, None, 2, 4, "int8", 64)
        y.sum().backward()
    dense = torch.zeros(17, 192, dtype=torch.float64).masked_scatter(random_mask(17, 192, 2, 4), values)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1))


def test_the_operator_is_one_as_torch_expects_it():
    codes, scale, meta, bias = made(2, 4, "int4")
    x = gaussian(3, 192).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.optimum_eggs.coded_linear, (x, codes, scale, meta, bias, 2, 4, "int4", 64), test_utils=tests)


def test_compiled_it_gives_the_same():
    codes, scale, meta, bias = made(2, 4, "int8")
    x = gaussian(2, 192)

    def layer(x):
        return coded_linear(x, codes, scale, meta, bias, 2, 4, "int8", 64) * 2

    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_under_autocast_the_product_is_in_its_dtype():
    codes, scale, meta, bias = made(2, 4, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert coded_linear(gaussian(2, 192), codes, scale, meta, bias, 2, 4, "int8", 64).dtype == torch.bfloat16


def test_no_tokens_give_no_outputs():
    codes, scale, meta, bias = made(2, 4, "int8")
    assert coded_linear(torch.empty(0, 192), codes, scale, meta, bias, 2, 4, "int8", 64).shape == (0, 17)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    codes, scale, meta, bias = made(2, 4, "int8")
    x = gaussian(1, 192)
    x[0, 3] = value
    assert not bool(torch.isfinite(coded_linear(x, codes, scale, meta, bias, 2, 4, "int8", 64)).all())


def test_what_does_not_belong_together_never_reaches_a_kernel():
    codes, scale, meta, bias = made(2, 4, "int8")
    for wrong in (
        (codes[:, :-1], scale, meta, bias),
        (codes, scale[:, :-1], meta, bias),
        (codes, scale, meta[:, :-1], bias),
        (codes[:-1], scale, meta, bias),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            coded_linear(gaussian(1, 192), *wrong, 2, 4, "int8", 64)
