"""Products of 16 bits that are made in float32, as on a processor with AVX2 alone."""

import pytest
import torch
from oracles import gaussian
from products import OP, arguments
from torch import nn

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.ops import INSTRUCTION_SETS, explain, force, native, select, wide
from optimum_eggs.ops.dense_linear import dense_linear
from optimum_eggs.ops.nm_linear import nm_linear

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason=f"no native extension: {native.missing}")
HALVES = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # what rounding once may change of a number


@pytest.fixture(autouse=True)
def _widens(monkeypatch):
    def widens(dtype, device_type):
        return dtype in HALVES and device_type == "cpu"

    monkeypatch.setattr(select, "widens", widens)
    monkeypatch.setattr(wide, "widens", widens)
    monkeypatch.setattr(wide, "_NUMBERS", 1 << 13)  # weights are cast in several parts
    select.publish()
    yield
    monkeypatch.undo()
    select.publish()


def check(found, x, weight, bias):
    """It is the product, rounded once."""
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=UNIT[x.dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(6, 8)], ids=str)  # one that is skipped, one that is not
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("autocast", [True, False])
def test_packed_layers(autocast, isa, pattern, dtype):
    dense = nn.Linear(192, 150, dtype=dtype).requires_grad_(False)
    layer = NMLinear.from_linear(dense, pattern)
    with force(isa=isa):
        slow = isa != "amx" or dtype is not torch.bfloat16  # whose tiles take any number of tokens
        assert explain(layer, 600).wide is slow
        assert ("in float32" in explain(layer, 600).why) is slow
        assert not explain(layer, 4).wide
        for shape in ((600,), (3, 23), (4,)):
            x = gaussian(*shape, 192, dtype=dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                found = layer(x)
            check(found, x, layer.dense_weight(), layer.bias)


@pytest.mark.parametrize("backend", ["native", "panel", "reference"])
def test_what_is_forced_is_as_it_is(backend):
    with force(backend):
        assert not select.choose(torch.bfloat16, torch.device("cpu"), 600, 192, 2, 4).wide
        assert not select.dense_is_wide(torch.bfloat16, torch.device("cpu"), 600)


def test_float32_and_other_devices_are_as_they_are():
    assert not select.choose(torch.float32, torch.device("cpu"), 600, 192, 2, 4).wide
    assert not select.choose(torch.bfloat16, torch.device("cuda"), 600, 192, 2, 4).wide
    assert not select.dense_is_wide(torch.float32, torch.device("cpu"), 600)
    assert not select.dense_is_wide(torch.bfloat16, torch.device("cpu"), 1)


def test_not_in_a_forked_child_where_casts_of_torch_may_hang(monkeypatch):
    monkeypatch.setattr(native, "torch_may_hang", lambda: True)
    assert not select.choose(torch.bfloat16, torch.device("cpu"), 600, 192, 2, 4).wide
    assert not select.dense_is_wide(torch.bfloat16, torch.device("cpu"), 600)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers(bias, dtype):
    weight, offset = gaussian(150, 192, dtype=dtype, seed=1), gaussian(150, dtype=dtype, seed=2) if bias else None
    for shape in ((600,), (3, 3)):
        x = gaussian(*shape, 192, dtype=dtype)
        check(dense_linear(x, weight, offset), x, weight, offset)


@pytest.mark.parametrize("case", ["packed", "int8", "int4", "dense"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_operation_of_every_kind_of_layer(case, autocast):
    given, x = arguments(case, rows=150, dtype=torch.bfloat16), gaussian(40, 192, dtype=torch.bfloat16)
    with force("reference"):
        expected = OP(x, *given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = OP(x, *given)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(compiled):
    layer = NMLinear.from_linear(nn.Linear(192, 150, dtype=torch.bfloat16).requires_grad_(False), NMPattern(2, 4))
    values, x = layer.weight.detach(), gaussian(40, 192, dtype=torch.bfloat16)
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        own = [each.detach().to(dtype).requires_grad_() for each in (x, values)]

        def loss(inputs, weight):
            return nm_linear(inputs, weight, layer.weight_meta, None, 2, 4).square().sum()

        run = torch.compile(loss, backend="aot_eager") if compiled and dtype is torch.bfloat16 else loss
        run(*own).backward()
        found[dtype] = [each.grad for each in own]
    for ours, exact in zip(*found.values(), strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


def test_shapes_that_do_not_fit_are_errors_of_torch():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        dense_linear(gaussian(40, 32, dtype=torch.bfloat16), gaussian(30, 64, dtype=torch.bfloat16), None)
