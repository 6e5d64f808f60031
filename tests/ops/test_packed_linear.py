"""The products as operations without derivatives: equal to the layers', by whichever road torch takes to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import gaussian
from products import CASES, DTYPES, OP, arguments, has_kernels
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.errors import ShapeError
from optimum_eggs.nn.dense import read_fast
from optimum_eggs.ops import BACKENDS, INSTRUCTION_SETS, force, native
from optimum_eggs.ops.coded_linear import coded_linear


def by_python(x, given):
    return torch.ops.optimum_eggs.packed_linear_by_python(x, *given)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_operation_is_well_formed(case, bias):
    opcheck(OP.default, (gaussian(2, 3, 192), *arguments(case, bias=bias)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_what_the_layers_give(case, dtype):
    given = arguments(case, dtype=dtype)
    for shape in ((192,), (1, 1, 192), (8, 192), (2, 3, 2, 192), (700, 192), (0, 192)):
        x = gaussian(*shape, dtype=dtype)
        assert torch.equal(OP(x, *given), by_python(x, given))


@pytest.mark.parametrize("case", CASES)
def test_inputs_that_are_not_contiguous_and_views_are_read_right(case):
    given = arguments(case, dtype=torch.bfloat16)
    x = gaussian(192, 4, dtype=torch.bfloat16).t()
    assert torch.equal(OP(x, *given), OP(x.contiguous(), *given))
    rows = gaussian(7, 192, dtype=torch.bfloat16)
    assert torch.equal(OP(rows[3:5], *given), OP(rows[3:5].clone(), *given))
    base = gaussian(4, 192 + 7, dtype=torch.bfloat16)[:, 7:]
    assert torch.equal(OP(base, *given), OP(base.clone(), *given))


@has_kernels
@pytest.mark.parametrize("case", CASES)
def test_its_own_kernel_runs(case, monkeypatch):
    called = []
    for name in ("linear", "coded_linear"):
        monkeypatch.setattr(native, name, lambda *_, name=name: called.append(name))
    given, x = arguments(case, dtype=torch.bfloat16), gaussian(2, 192, dtype=torch.bfloat16)
    assert OP(x, *given).shape == (2, 33)
    assert not called
    by_python(x, given)
    assert called


@pytest.mark.parametrize("backend", [None, "native", "panel", "reference", "dense"])
def test_what_is_forced_holds_for_it_too(backend):
    if backend in ("native", "panel") and not INSTRUCTION_SETS:
        pytest.skip("no native extension")
    assert backend is None or backend in BACKENDS
    given, x = arguments("packed"), gaussian(3, 192)
    with force(backend):
        assert torch.equal(OP(x, *given), by_python(x, given))
    for isa in INSTRUCTION_SETS:
        with force(isa=isa):
            assert torch.equal(OP(x, *given), by_python(x, given))


def broken():
    """Arguments that kernels, which read by address, must not be given; and how torch puts it."""
    packed, coded = arguments("packed"), arguments("int4")
    x = gaussian(2, 192)
    yield "columns", (gaussian(2, 188), *packed)
    yield "dtype", (x.double(), *packed)
    yield "meta", (x, packed[0], None, packed[2][:, :-1].contiguous(), *packed[3:])
    yield "rows of meta", (x, packed[0], None, packed[2][:-1], *packed[3:])
    yield "bias", (x, *packed[:3], packed[3][:-1], *packed[4:])
    yield "pattern", (x, *packed[:4], 3, 4, 0, 0)
    yield "no meta", (x, packed[0], None, None, *packed[3:])
    yield "scale", (x, coded[0], coded[1][:, :-1], *coded[2:])
    yield "codes", (x, coded[0][:, :-1], *coded[1:])
    yield "bits", (x, *coded[:6], 8, 64)


@pytest.mark.parametrize(("what", "given"), [pytest.param(*case, id=case[0]) for case in broken()])
def test_what_does_not_belong_together_is_an_error(what, given):
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        OP(*given)


@pytest.mark.parametrize("case", CASES)
def test_vmap(case):
    given, x = arguments(case), gaussian(3, 2, 192)
    found = torch.func.vmap(lambda one: OP(one, *given))(x)
    torch.testing.assert_close(found, torch.stack([OP(one, *given) for one in x]))
    weights = torch.stack([given[0], given[0].flip(0)])
    found = torch.func.vmap(lambda w: OP(x[0], w, *given[1:]))(weights)
    torch.testing.assert_close(found, torch.stack([OP(x[0], w, *given[1:]) for w in weights]))


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        OP(gaussian(3, 192), *arguments("packed"))
    assert counter.get_total_flops() == 2 * 3 * 33 * 96


def test_compiled_layers_call_it_where_no_derivatives_are_asked_for():
    dense = torch.nn.Linear(192, 33, dtype=torch.bfloat16).requires_grad_(False)
    layer = NMLinear.from_linear(dense, NMPattern(2, 4))
    read_fast(whole := torch.nn.Sequential(layer, dense_after := torch.nn.Linear(33, 5, dtype=torch.bfloat16)))
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "optimum_eggs" in str(node.target)])
        return graph.forward

    compiled = torch.compile(whole, backend=backend, fullgraph=True)
    x = gaussian(3, 192, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), whole(x))
    assert graphs == [["optimum_eggs.packed_linear"] * 2]
    compiled(x.clone().requires_grad_()).sum().backward()
    assert "optimum_eggs.nm_linear" in graphs[-1]
    assert dense_after.weight.grad is not None


@has_kernels
def test_what_is_raised_on_the_way_stays_what_it_is(monkeypatch):
    """Not by way of C++, which knows one kind of error."""
    dense = torch.nn.Linear(192, 33)
    layer = NMLinear.from_linear(dense, NMPattern(2, 4))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["optimum_eggs.ops.nm_linear"], "run", interrupted)
    with torch.no_grad():
        assert layer(gaussian(2, 192)).shape == (2, 33)  # by its own kernel
        with pytest.raises(KeyboardInterrupt):
            layer(gaussian(100, 192))
    with torch.no_grad(), pytest.raises(ShapeError, match="got inputs of"):
        coded_linear(torch.ones(2, 192, dtype=torch.int64), *arguments("int8")[:4], 2, 4, "int8", 64)


def test_subclasses_autocast_and_forward_derivatives_go_to_torch():
    class Own(torch.Tensor):
        pass

    dense = torch.nn.Linear(192, 33, dtype=torch.bfloat16).requires_grad_(False)
    x = gaussian(2, 192, dtype=torch.bfloat16)
    read_fast(model := torch.nn.Sequential(dense))
    expected = torch.nn.functional.linear(x, dense.weight, dense.bias)
    with torch.no_grad():
        assert type(model(x.as_subclass(Own))) is Own
        with torch.autocast("cpu", torch.float16):
            assert model(x.half()).dtype is torch.float16
            for tokens in (2, 40):
                assert model(gaussian(tokens, 192)).dtype is torch.float16
        for run in (model, torch.compile(model, backend="eager")):
            _, tangent = torch.func.jvp(run, (x,), (x,))
            torch.testing.assert_close(tangent, expected - dense.bias, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_uses_one_thread():
    code = """
import os, torch
from oracles import gaussian
from products import OP, arguments
torch.set_num_threads(2)
given, x = arguments("packed", 4096, 512), gaussian(2, 4096)
expected = OP(x, *given)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(OP(x, *given), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    path = str(Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60, env=os.environ | {"PYTHONPATH": path}
    )
