"""Packed layers on the device: products, gradients, adapters, and the kernels made for GPUs."""

from __future__ import annotations

import contextlib
import copy
import os
from importlib.util import find_spec

import pytest
import torch
from oracles import gaussian, random_mask, same_bits
from torch import nn

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.ops import choose, force, nm_linear
from optimum_eggs.packing import pack
from optimum_eggs.recovery.low_rank import masked_low_rank

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(6, 8), NMPattern(5, 16), NMPattern(17, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs: pip install triton")


def make(rows=96, columns=128, pattern=PATTERNS[0], dtype=torch.float32, bias=True):
    """A packed layer on the CPU."""
    dense = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    dense.weight.data = gaussian(rows, columns, dtype=dtype)
    if bias:
        dense.bias.data = gaussian(rows, seed=1, dtype=dtype)
    return NMLinear.from_linear(dense, pattern, random_mask(rows, columns, pattern.n, pattern.m))


def assert_product(y, x, layer):
    """Y is X Wᵀ + b, of the layer on the CPU, up to the rounding of its terms."""
    weight, x = layer.dense_weight().double(), x.double()
    exact, size = x @ weight.t(), x.abs() @ weight.abs().t()
    if layer.bias is not None:
        exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    assert y.shape == exact.shape
    assert bool(((y.detach().cpu().double() - exact).abs() <= 2 * torch.finfo(y.dtype).eps * size + 1e-5).all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (70,), (0,)])
def test_products(batch, bias, dtype, device):
    layer, x = make(dtype=dtype, bias=bias), gaussian(*batch, 128, seed=2, dtype=dtype)
    y = copy.deepcopy(layer).to(device)(x.to(device))
    assert (y.device, y.dtype) == (device, dtype)
    assert_product(y, x, layer)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_products_of_every_pattern(pattern, device):
    layer, x = make(pattern=pattern), gaussian(3, 128, seed=2)
    assert_product(copy.deepcopy(layer).to(device)(x.to(device)), x, layer)


def test_there_and_back_keeps_every_bit(device):
    layer = make(dtype=torch.bfloat16)
    again = copy.deepcopy(layer).to(device).cpu()
    assert same_bits(again.weight.data, layer.weight.data)
    assert torch.equal(again.weight_meta, layer.weight_meta)
    empty = NMLinear(128, 96, device=device, dtype=torch.bfloat16)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dense_weight().cpu(), layer.dense_weight())
    assert torch.equal(empty.to_linear().weight.cpu(), layer.dense_weight())


@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (0,)])
def test_gradients(batch, device):
    found = []
    for place in (torch.device("cpu"), device):
        layer = make().to(place).requires_grad_()
        x = gaussian(*batch, 128, seed=2).to(place).requires_grad_()
        y = layer(x)
        weighed = (y * gaussian(*batch, 96, seed=3).to(place)).sum()
        found.append(torch.autograd.grad(weighed, (x, layer.weight, layer.bias)))
    for own, other in zip(*found, strict=True):
        assert other.device == device
        torch.testing.assert_close(other.cpu(), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    layer, x = make(), gaussian(3, 128, seed=2)
    moved = copy.deepcopy(layer).to(device).requires_grad_()
    with torch.autocast(device.type, dtype):
        y = moved(x.to(device))
    assert y.dtype is dtype
    assert_product(y, x.to(dtype), layer.to(dtype))
    y.float().sum().backward()
    assert moved.weight.grad.dtype is torch.float32
    assert bool(moved.weight.grad.any())


def test_a_compiled_layer(device):
    layer, x = make(), gaussian(3, 128, seed=2)
    compiled = torch.compile(copy.deepcopy(layer).to(device), fullgraph=True)
    with torch.no_grad():
        assert_product(compiled(x.to(device)), x, layer)


@contextlib.contextmanager
def quiet(device):
    """Within it, what makes the processor wait for the GPU is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_and_training_steps_after_the_first_wait_for_nothing(dtype, device):
    layer, x = make(dtype=dtype), gaussian(3, 128, seed=2, dtype=dtype)
    moved, there = copy.deepcopy(layer).to(device).eval(), x.to(device)
    with torch.no_grad():
        assert_product(moved(there), x, layer)
        with quiet(device):
            y = moved(there)
    assert_product(y, x, layer)
    moved.train()
    moved(there).sum().backward()
    with quiet(device):
        moved(there).sum().backward()


def test_the_dense_weight_leaves_the_device_with_the_layer(device):
    if device.type == "cpu":
        pytest.skip("needs two devices")
    layer = make(rows=1024, columns=1024).to(device).eval()
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        layer(gaussian(3, 1024).to(device))
    assert torch.cuda.memory_allocated(device) >= before + 4 * 1024 * 1024
    layer.cpu()
    assert torch.cuda.memory_allocated(device) < before


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("warm", [True, False], ids=["called before", "not called before"])
def test_a_captured_layer(warm, backend, device):
    if device.type == "cpu":
        pytest.skip("needs CUDA graphs")
    layer, x = make(), gaussian(3, 128, seed=2)
    moved, there, stream = copy.deepcopy(layer).to(device).eval(), x.to(device), torch.cuda.Stream(device)
    torch.nn.functional.linear(there, there)  # cuBLAS is set up outside of the graph
    with force(backend), torch.no_grad():
        if warm:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                moved(there)
            torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = moved(there)
    moved.forget()
    taken = [torch.full((96, 128), torch.nan, device=device) for _ in range(8)]  # where the dense weight was
    for seed in (3, 4):
        x = gaussian(3, 128, seed=seed)
        with torch.no_grad():
            layer.weight.mul_(2)
            moved.weight.mul_(2)
        there.copy_(x)
        graph.replay()
        assert_product(y, x, layer)
    del taken


@pytest.mark.parametrize("warm", [True, False], ids=["called before", "not called before"])
def test_a_compiled_layer_in_graphs(warm, device):
    layer = make()
    moved = copy.deepcopy(layer).to(device).eval()
    compiled = torch.compile(moved, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        if warm:
            moved(gaussian(3, 128).to(device))
        for seed in range(6):
            x = gaussian(3, 128, seed=seed)
            assert_product(compiled(x.to(device)), x, layer)
            layer.weight.mul_(2)
            moved.weight.mul_(2)
            moved.train()
            moved.eval()


def test_the_masked_low_rank_product_and_its_gradients(device):
    layer, found = make(), []
    for place in (torch.device("cpu"), device):
        down, up = (gaussian(*shape, seed=4).to(place).requires_grad_() for shape in ((4, 128), (96, 4)))
        delta = masked_low_rank(down, up, layer.weight_meta.to(place), layer.pattern)
        found.append((delta, *torch.autograd.grad(delta.square().sum(), (down, up))))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other.detach().cpu(), own.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["added to the weight", "beside it"])
def test_an_adapter_and_its_gradients(dropout, device):
    peft = pytest.importorskip("peft")
    found = []
    for place in (torch.device("cpu"), device):
        config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(make()), config).to(place)
        lora = model.base_model.model[0]
        y = model(gaussian(3, 128, seed=2).to(place))
        weights = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        gradients = torch.autograd.grad(y.square().sum(), weights)
        merged = model.merge_and_unload()[0]
        assert torch.equal(merged.weight_meta.cpu(), make().weight_meta)
        found.append((y, *gradients, merged.weight))
    for own, other in zip(*found, strict=True):
        assert other.device == device
        torch.testing.assert_close(other.detach().cpu(), own.detach(), rtol=1e-3, atol=1e-2)


def on_triton(x, layer):
    from optimum_eggs.ops.triton import linear

    pattern = layer.pattern
    return linear(x, layer.weight.data, layer.weight_meta, layer.bias, pattern.n, pattern.m)


@pytest.fixture
def runs_triton(device):
    """Triton that runs on the device: on the CPU its interpreter alone does."""
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton compiles for GPUs alone; TRITON_INTERPRET=1 interprets it")


@needs_triton
@pytest.mark.usefixtures("runs_triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("rows", [1, 17, 96])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_triton_kernel(pattern, rows, tokens, dtype, device):
    layer, x = make(rows=rows, columns=160, pattern=pattern, dtype=dtype, bias=tokens != 2), gaussian(tokens, 160)
    x = x.to(dtype)
    assert_product(on_triton(x.to(device), copy.deepcopy(layer).to(device)), x, layer)


@needs_triton
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128)])
def test_the_triton_kernel_in_a_layer(shape, device):
    layer, x = make(dtype=torch.bfloat16), gaussian(*shape, seed=2, dtype=torch.bfloat16)
    with force("triton"):
        assert device.type == "cpu" or choose(torch.bfloat16, device, 1).backend == "triton"
        assert_product(copy.deepcopy(layer).to(device)(x.to(device)), x, layer)


@needs_triton
def test_the_triton_kernel_runs_where_its_input_is(second_device):
    layer, x = make(dtype=torch.bfloat16), gaussian(1, 128, seed=2, dtype=torch.bfloat16)
    before = torch.cuda.current_device()
    assert before != second_device.index
    y = on_triton(x.to(second_device), copy.deepcopy(layer).to(second_device))
    assert y.device == second_device
    assert torch.cuda.current_device() == before
    assert_product(y, x, layer)


@pytest.fixture
def sparse_cores(device):
    """A GPU that multiplies semi-structured matrices; on the CPU the reference stands in."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs a GPU of compute capability 8.0 or later")


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.usefixtures("sparse_cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (64,), (2, 40)])
def test_the_semi_structured_product(batch, bias, dtype, device):
    layer, x = make(rows=128, dtype=dtype, bias=bias), gaussian(*batch, 128, seed=2, dtype=dtype)
    moved = copy.deepcopy(layer).to(device)
    with force("semi_structured"):
        assert device.type == "cpu" or choose(dtype, device, 64).backend == "semi_structured"
        assert_product(moved(x.to(device)), x, layer)
        assert_product(moved(x.to(device)), x, layer)  # the bits are in torch's order by now


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.usefixtures("sparse_cores")
def test_what_has_no_semi_structured_product_is_unpacked(device):
    layer, x = make(rows=40, dtype=torch.bfloat16), gaussian(3, 128, seed=2, dtype=torch.bfloat16)
    with force("semi_structured"):
        assert_product(copy.deepcopy(layer).to(device)(x.to(device)), x, layer)


def test_parts_on_two_devices_are_refused(device):
    if device.type == "cpu":
        pytest.skip("needs two devices")
    layer = make()
    values, meta = pack(layer.dense_weight(), layer.mask(), layer.pattern)
    with pytest.raises(RuntimeError, match="device"):
        nm_linear(gaussian(3, 128).to(device), values, meta, None, 2, 4)
