"""The operation as torch sees it: schema, gradients, compile, export, autocast; and which backend is chosen."""

import contextlib
import io
import os
import subprocess
import sys
import warnings

import pytest
import torch
from oracles import gaussian
from torch.nn import functional as F

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.errors import ConfigError, ShapeError
from optimum_eggs.ops import INSTRUCTION_SETS, Choice, choose, explain, force, native, nm_linear, select

CPU = torch.device("cpu")
TWO_OF_FOUR = NMPattern(2, 4)
needs_native = pytest.mark.skipif(not INSTRUCTION_SETS, reason=f"no native extension: {native.missing}")


def layer(columns=32, rows=12, bias=True, dtype=torch.float32, trained=False, pattern=TWO_OF_FOUR):
    dense = torch.nn.Linear(columns, rows, bias=bias, dtype=dtype)
    dense.weight.data = gaussian(rows, columns, dtype=dtype)
    made = NMLinear.from_linear(dense, pattern)
    return made.requires_grad_(trained)


def arguments(made, x):
    return x, made.weight, made.weight_meta, made.bias, made.pattern.n, made.pattern.m


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("batch", [(3,), (2, 5)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, in torch 2.15
def test_the_operation_is_well_formed(bias, trained, batch):
    made = layer(bias=bias, trained=trained)
    x = gaussian(*batch, 32, seed=1).requires_grad_(trained)
    torch.library.opcheck(torch.ops.optimum_eggs.nm_linear.default, arguments(made, x))


def test_gradients_are_numerically_right():
    made = layer(trained=True).double()
    x = gaussian(4, 32, seed=1, dtype=torch.float64).requires_grad_()
    _, weight, meta, bias, n, m = arguments(made, x)
    assert torch.autograd.gradcheck(lambda x, w, b: nm_linear(x, w, meta, b, n, m), (x, weight, bias))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 32)])
def test_any_number_of_leading_dimensions(shape):
    made = layer()
    x = gaussian(*shape, seed=1)
    torch.testing.assert_close(made(x), F.linear(x, made.dense_weight(), made.bias))


def test_what_is_not_contiguous_is_read_right():
    made = layer()
    x = gaussian(32, 6, seed=1).t()
    torch.testing.assert_close(made(x), F.linear(x, made.dense_weight(), made.bias))
    made.weight.data = made.weight.data.t().contiguous().t()
    torch.testing.assert_close(made(x), F.linear(x, made.dense_weight(), made.bias))


def test_dtypes_must_agree_as_in_a_dense_layer():
    with pytest.raises(RuntimeError, match="dtype"):
        layer(dtype=torch.bfloat16)(gaussian(2, 32))
    with pytest.raises(RuntimeError):
        layer()(gaussian(2, 28))


@pytest.mark.parametrize(
    "damage",
    [
        {"bias": torch.zeros(3)},
        {"weight_meta": torch.zeros(12, 3, dtype=torch.uint8)},
        {"weight_meta": torch.zeros(2, 4, dtype=torch.uint8)},
        {"weight_meta": torch.zeros(12, 4, dtype=torch.int64)},
    ],
    ids=["bias", "narrow", "short", "dtype"],
)
def test_what_does_not_belong_together_never_reaches_c(damage):
    made, calls = layer(), []
    given = {"weight": made.weight, "weight_meta": made.weight_meta, "bias": made.bias} | damage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "linear", lambda *arguments: calls.append(arguments))
        with contextlib.suppress(RuntimeError):
            nm_linear(gaussian(2, 32), **given, n=2, m=4)
    assert calls == []


def test_a_scalar_is_refused_as_in_a_dense_layer():
    with pytest.raises((RuntimeError, IndexError)):
        layer()(torch.tensor(1.0))


def test_no_gradient_is_kept_where_none_is_asked_for():
    made = layer()
    assert made(gaussian(2, 32)).grad_fn is None
    assert made(gaussian(2, 32).requires_grad_()).grad_fn is not None
    with torch.no_grad():
        assert made(gaussian(2, 32).requires_grad_()).grad_fn is None


def test_autocast_computes_in_its_dtype():
    made = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(gaussian(2, 32))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, made.bfloat16()(gaussian(2, 32).bfloat16()))


def test_autocast_leaves_float64_alone_as_in_a_dense_layer():
    made = layer(dtype=torch.float64)
    x = gaussian(2, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype is F.linear(x, made.dense_weight()).dtype is torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_computes_the_same(backend):
    made = layer()
    x = gaussian(3, 32, seed=1)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(made(x).sum(), x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_inductor_keeps_the_operation_whole_where_ci_is_set(monkeypatch):
    from torch._inductor import config, lowering

    monkeypatch.setenv("CI", "true")  # there it refuses what has a decomposition that it does not use
    monkeypatch.delitem(lowering.lowerings, torch.ops.optimum_eggs.nm_linear.default, raising=False)
    made, x = layer(), gaussian(5, 32, seed=1).requires_grad_()
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        (found,) = torch.autograd.grad(torch.compile(made, fullgraph=True)(x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(made(x).sum(), x)[0])


def test_an_exported_layer_holds_the_operation(monkeypatch):
    def apart(*arguments):
        raise AssertionError("the operation was taken apart to learn its shape")

    monkeypatch.setitem(torch._decomp.decomposition_table, torch.ops.optimum_eggs.nm_linear.default, apart)
    made = layer()
    x = gaussian(3, 32, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert any(node.target is torch.ops.optimum_eggs.nm_linear.default for node in program.graph.nodes)
    x = gaussian(7, 32, seed=2)
    torch.testing.assert_close(program.module()(x), made(x))


def test_modes_and_transforms_see_the_call():
    made = layer()
    x = gaussian(3, 32, seed=1)
    with torch.utils.flop_counter.FlopCounterMode(display=False), torch.no_grad():
        torch.testing.assert_close(made(x), F.linear(x, made.dense_weight(), made.bias))
    with torch.device("meta"):
        assert made(torch.empty(3, 32, device="cpu")).device == CPU
    torch.testing.assert_close(
        torch.vmap(made, in_dims=1)(x.unsqueeze(0).expand(5, 3, 32)), made(x).unsqueeze(1).expand(3, 5, 12)
    )
    weights = torch.stack([made.weight, 2 * made.weight])
    both = torch.vmap(lambda weight: nm_linear(x, weight, made.weight_meta, None, 2, 4))(weights)
    torch.testing.assert_close(both[1], 2 * both[0])
    torch.testing.assert_close(both[0], F.linear(x, made.dense_weight()))
    assert torch.func.functional_call(made, {"bias": torch.zeros(12)}, x).shape == (3, 12)


def test_transforms_of_functions_see_through_the_operation():
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

    made = layer()
    dense, x, ones = made.to_linear(), gaussian(5, 32, seed=1), torch.ones(5, 32)
    transforms = {
        "grad": lambda f: grad(lambda x: f(x).pow(3).sum())(x),
        "grad of grad": lambda f: grad(lambda x: grad(lambda y: f(y).pow(3).sum())(x).sum())(x),
        "grad of each": lambda f: vmap(grad(lambda x: f(x).pow(3).sum()))(x),
        "vjp": lambda f: vjp(f, x)[1](torch.ones(5, 12))[0],
        "jvp": lambda f: jvp(f, (x,), (ones,))[1],
        "jacrev": lambda f: jacrev(f)(x[0]),
        "jacfwd": lambda f: jacfwd(f)(x[0]),
        "hessian": lambda f: hessian(lambda x: f(x).pow(3).sum())(x[0]),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(made), transform(dense), msg=name)

    def loss(module):
        return lambda parameters, x: functional_call(module, parameters, (x,)).pow(3).sum()

    packed, whole = (
        vmap(grad(loss(module)), in_dims=(None, 0))(dict(module.named_parameters()), x) for module in (made, dense)
    )
    kept = whole["weight"][:, made.mask()].view(5, *made.weight.shape)  # of each input, the gradient of what is kept
    torch.testing.assert_close(packed, {"weight": kept, "bias": whole["bias"]})


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32)])
def test_jacobians_are_computed_in_one_pass_too(shape):
    made, x = layer(), gaussian(*shape, seed=1)

    def of_values(weight, bias):
        return torch.ops.optimum_eggs.nm_linear(x, weight, made.weight_meta, bias, 2, 4)

    for function, inputs in ((made, x), (of_values, (made.weight.detach(), made.bias.detach()))):
        one_by_one = torch.autograd.functional.jacobian(function, inputs)
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, inputs, vectorize=True), one_by_one)


def test_tangents_are_not_lost():
    from torch.autograd import forward_ad

    made = layer()
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(made(forward_ad.make_dual(gaussian(2, 32), gaussian(2, 32, seed=1))))
    torch.testing.assert_close(y.tangent, F.linear(gaussian(2, 32, seed=1), made.dense_weight()))


@pytest.mark.parametrize("trained", [True, False])
def test_the_products_of_kept_values_are_counted(trained):
    made = layer(columns=32, rows=12, trained=trained)  # 2:4: 16 of 32 are kept
    x = gaussian(2, 5, 32, seed=1).requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = made(x)
    assert counter.get_total_flops() == 2 * 10 * 12 * 16
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # The gradient of x is a product with the unpacked matrix; so is that of the values, where they are trained.
    assert counter.get_total_flops() == 2 * 10 * 12 * 32 * (1 + trained)


def test_onnx_takes_the_operation_apart():
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    made, x = layer(), gaussian(3, 32, seed=1)
    for options in ({"dynamo": True, "verbose": False}, {"dynamo": False}):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(made, (x,), None if options["dynamo"] else file, **options)
        model = program.model_proto if options["dynamo"] else onnx.load_from_string(file.getvalue())
        (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), made(x))


def test_onnx_files_of_both_exporters_stay_packed():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    made = layer(columns=512, rows=384)
    for options in ({"dynamo": True, "verbose": False}, {"dynamo": False}):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(made, (gaussian(3, 512),), None if options["dynamo"] else file, **options)
        size = program.model_proto.ByteSize() if options["dynamo"] else len(file.getvalue())
        assert size < 0.65 * 4 * 384 * 512, options  # values are 0.5 of the dense bytes, bits 0.03


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:4"])
def test_an_exported_program_comes_apart_into_operations_of_torch(pattern):
    # That is what the ONNX exporter does: the decompositions that it uses are those in this table.
    pattern = NMPattern.parse(pattern)
    made = NMLinear.from_linear(torch.nn.Linear(24, 6), pattern)
    x = gaussian(3, 24, seed=1)
    op = torch.ops.optimum_eggs.nm_linear.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(made, (x,)).run_decompositions({op: torch._decomp.decomposition_table[op]})
    assert {node.target.namespace for node in program.graph.nodes if node.op == "call_function"} == {"aten"}
    torch.testing.assert_close(program.module()(x), made(x))


def test_the_meta_device_gives_a_shape():
    made = layer().to("meta")
    assert made(torch.empty(2, 5, 32, device="meta")).shape == (2, 5, 12)


@needs_native
def test_the_choice_explains_itself():
    few = explain(layer(), batch=1)
    assert few.backend == "native"
    assert few.isa == INSTRUCTION_SETS[-1]
    many = explain(layer(pattern=NMPattern(6, 8)), batch=4096)
    assert many.backend == "panel"
    assert "4096 tokens" in many.why
    assert choose(torch.float64, CPU, 1) == Choice(
        "reference", None, "the native kernels take float32, float16 and bfloat16, not torch.float64"
    )
    assert "meta" in choose(torch.float32, torch.device("meta"), 1).why


def test_a_dense_layer_has_no_choice_to_explain():
    with pytest.raises(ShapeError, match="Linear is not a packed layer"):
        explain(torch.nn.Linear(4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OPTIMUM_EGGS_BACKEND", "OPTIMUM_EGGS_ISA"])
def test_a_wrong_environment_variable_is_an_error_that_lists_what_there_is(name):
    code = """
import torch
from optimum_eggs import NMLinear, NMPattern
NMLinear.from_linear(torch.nn.Linear(8, 4), NMPattern(2, 4))(torch.ones(1, 8))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {name: "nonsense"})
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
    assert "'nonsense'" in done.stderr


@needs_native
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_choice_can_be_forced(isa):
    with force(isa=isa):
        assert choose(torch.float32, CPU, 1).isa == isa
        with force("panel", isa):
            assert choose(torch.float32, CPU, 1) == Choice("panel", isa, "forced")
        assert choose(torch.float32, CPU, 1).backend == "native"


def test_what_is_not_there_cannot_be_forced():
    with (
        pytest.raises(ConfigError, match=r"backend 'fast' is unknown; use one of native, panel, reference, dense"),
        force("fast"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"instruction set 'mmx' is not to be had here"), force(isa="mmx"):
        pass


@pytest.mark.slow
def test_an_extension_that_was_not_built_is_explained(forks):
    code = """
import importlib, sys
from optimum_eggs.ops import native
sys.modules["optimum_eggs.ops.native._native"] = None
importlib.reload(native).warn_missing()
"""
    said = forks.run("-c", code, check=True).stderr
    assert "there was no C compiler when the package was installed" in said
    assert "run `pip install -e .` in a clone of the repository" in said
    assert "circular import" not in said


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(select, "INSTRUCTION_SETS", ())
    monkeypatch.setattr(native, "missing", "no compiler")
    native.warn_missing.cache_clear()
    yield
    monkeypatch.undo()
    select.publish()


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension_the_reference_runs_and_says_so_once(caplog):
    with force():
        made = layer()
        for _ in range(2):
            torch.testing.assert_close(made(gaussian(2, 32)), F.linear(gaussian(2, 32), made.dense_weight(), made.bias))
        assert "missing: no compiler" in explain(made).why
        with pytest.raises(ConfigError, match="needs the native extension"), force("native"):
            pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no compiler" in caplog.text
