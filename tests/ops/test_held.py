"""What is made of packed tensors once: dense weights for devices without a kernel, places of kept values for training.

Here on the CPU, where they are forced; that a GPU gets them is a choice by the name of the device.
"""

import contextlib
import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import gaussian, random_mask, same_bits
from torch.nn import functional as F

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.ops import choose, force, gather, held, layout, nm_linear, spread
from optimum_eggs.recovery.low_rank import masked_low_rank

PATTERNS = [NMPattern(2, 4), NMPattern(1, 2), NMPattern(6, 8), NMPattern(5, 16), NMPattern(17, 32)]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _dense_backend():
    held._say_dense.cache_clear()
    held._say_captured.cache_clear()
    with force("dense"):
        yield


@pytest.fixture
def unpacked(monkeypatch):
    """The calls that unpack a weight to hold it, one entry each."""
    calls, plain = [], held.unpack
    monkeypatch.setattr(held, "unpack", lambda *given: calls.append(given) or plain(*given))
    return calls


@pytest.fixture
def sorted_out(monkeypatch):
    """The calls that work out positions."""
    calls, plain = [], layout.kept_positions
    monkeypatch.setattr(layout, "kept_positions", lambda *given: calls.append(given) or plain(*given))
    return calls


def make(rows=12, columns=32, pattern=PATTERNS[0], bias=True, dtype=torch.float32):
    dense = torch.nn.Linear(columns, rows, bias=bias, dtype=dtype)
    dense.weight.data = gaussian(rows, columns, dtype=dtype)
    return NMLinear.from_linear(dense, pattern, random_mask(rows, columns, pattern.n, pattern.m)).eval()


def call(layer, x):
    with torch.no_grad():
        return layer(x)


def by_reference(layer, x):
    with force("reference"), torch.no_grad():
        return layer(x)


def held_dense(layer, dtype=torch.float32):
    return held.find_dense(layer.weight, layer.weight_meta, 2, 4, dtype)


def is_held(layer):
    return layer.weight in held._held


def test_what_has_no_kernel_known_to_be_faster_holds_dense_weights_unless_it_is_told_otherwise():
    with force():
        for place in ("cuda", "mps", "xpu"):
            assert choose(torch.bfloat16, torch.device(place), 1).backend == "dense"
        assert choose(torch.float64, GPU, 64).backend == "dense"
        assert choose(torch.bfloat16, torch.device("cpu"), 1).backend != "dense"
        assert choose(torch.bfloat16, torch.device("meta"), 1).backend == "reference"
    for kept_packed in ("reference", "semi_structured"):
        with force(kept_packed):
            assert choose(torch.bfloat16, GPU, 64).backend == kept_packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_held_weight_gives_what_the_reference_gives_and_is_made_once(pattern, dtype, unpacked):
    layer, x = make(pattern=pattern, dtype=dtype), gaussian(3, 32, seed=1, dtype=dtype)
    for _ in range(3):
        assert same_bits(call(layer, x), by_reference(layer, x))
    assert len(unpacked) == 1
    with torch.inference_mode():
        assert same_bits(layer(x), by_reference(layer, x))
    assert len(unpacked) == 1


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def change_bits(layer):
    layer.weight_meta.copy_(make().weight_meta.roll(1, 0))


def replace_data(layer):
    layer.weight.data = layer.weight.data * 2


def replace_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def load(layer):
    layer.load_state_dict(layer.state_dict() | {"weight": layer.weight * 2})


def step(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_bits,
        replace_data,
        replace_parameter,
        load,
        step,
        NMLinear.double,
    ],
)
def test_it_is_made_again_when_the_layer_changes(change, unpacked):
    layer, x = make(), gaussian(3, 32, seed=1)
    before = call(layer, x)
    change(layer)
    x = x.to(layer.weight.dtype)
    after = call(layer, x)
    assert same_bits(after, by_reference(layer, x))
    assert change is NMLinear.double or not torch.equal(after, before)
    assert len(unpacked) == 2


def replace_bits(layer, bits):
    layer.weight_meta = bits


def replace_values(layer, values):
    layer.weight.data = values


@pytest.mark.parametrize(("name", "replace"), [("weight", replace_values), ("weight_meta", replace_bits)])
def test_memory_at_an_address_that_was_free_meanwhile_is_other_memory(name, replace):
    layer, x = make(), gaussian(3, 32, seed=1)
    memory = getattr(layer, name).detach().clone().numpy()
    for _ in range(3):
        memory[:] = np.roll(memory, 1, 0)
        replace(layer, torch.from_numpy(memory))  # the same address, and no change counted
        assert same_bits(call(layer, x), by_reference(layer, x))


@torch.no_grad()
def test_a_weight_that_reads_its_memory_in_another_order_is_another_one():
    layer, x = make(16), gaussian(3, 32, seed=1)
    call(layer, x)
    layer.weight.data = layer.weight.data.t()  # 16 x 16
    assert same_bits(call(layer, x), by_reference(layer, x))


def test_training_holds_no_dense_weight_and_lets_go_of_one(unpacked):
    layer, x = make(), gaussian(3, 32, seed=1)
    call(layer, x)
    assert is_held(layer)
    layer.train()
    assert not is_held(layer)
    call(layer, x)  # as when activations are computed again
    layer(x).sum().backward()
    assert not is_held(layer)
    layer.eval()
    call(layer, x)
    layer.eval()
    assert is_held(layer)
    layer(x).sum().backward()  # trained in eval mode
    assert not is_held(layer)
    assert len(unpacked) == 2


def change_mode(layer):
    layer.train()
    layer.eval()


@pytest.mark.parametrize("forget", [NMLinear.forget, change_mode])
def test_changes_that_torch_does_not_count_are_seen_after_all_is_forgotten(forget, sorted_out):
    layer, x = make(), gaussian(3, 32, seed=1)
    call(layer, x)
    gather(gaussian(12, 32), layer.weight_meta, layer.pattern)
    layer.weight.data.mul_(2)
    layer.weight_meta.data.copy_(layer.weight_meta.roll(1, 0))
    forget(layer)
    assert layer.weight_meta not in held._held
    assert same_bits(call(layer, x), by_reference(layer, x))
    dense = gaussian(12, 32, seed=3)
    assert torch.equal(gather(dense, layer.weight_meta, layer.pattern), dense[layer.mask()].view(12, 16))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_layer_is_held_where_gradients_pass_through_it(autocast, unpacked, sorted_out):
    layer, x = make().requires_grad_(False), gaussian(3, 32, seed=1).requires_grad_()

    def gradient():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        return torch.autograd.grad(y.pow(2).sum(), x)[0]

    with force("reference"):
        expected = gradient()
    sorted_out.clear()
    for _ in range(2):
        assert same_bits(gradient(), expected)
    assert len(unpacked) == 1
    assert not sorted_out  # the backward pass reads the dense weight too


def test_a_default_device_and_autocast_hold_one_too(unpacked):
    layer, x = make(), gaussian(3, 32, seed=1)
    with torch.device("cpu"):
        for _ in range(2):
            assert same_bits(call(layer, x), by_reference(layer, x))
    assert len(unpacked) == 1
    for enabled in (True, False, True):  # one for each dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert same_bits(call(layer, x), by_reference(layer, x))
    assert len(unpacked) == 2
    with torch.device("cpu"), torch.autocast("cpu", torch.bfloat16):
        call(layer, x)
    assert len(unpacked) == 2
    change_in_place(layer)
    call(layer, x)
    assert held_dense(layer, torch.bfloat16) is None
    assert len(held._held[layer.weight].made) == 1


def test_dtypes_that_differ_are_refused_whatever_is_held():
    layer, x = make(bias=False), gaussian(3, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        call(layer, x)
    with pytest.raises(RuntimeError, match="same dtype"):
        call(layer, x.bfloat16())


def test_state_dicts_copies_and_pickles_are_packed():
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    size = len(pickle.dumps(layer))
    call(layer, gaussian(3, 32))
    assert is_held(layer)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(pickle.dumps(layer)) == size
    assert not is_held(copy.deepcopy(layer))
    assert [name for name, _ in layer.named_buffers()] == ["weight_meta"]


def test_it_goes_with_the_weight_and_when_the_layer_is_moved():
    def move(layer):
        layer.to("meta")

    for leave in (move, lambda layer: layer.__dict__.clear()):
        layer = make()
        call(layer, gaussian(3, 32))
        gone = weakref.ref(held_dense(layer))
        leave(layer)
        gc.collect()
        assert gone() is None


def test_weights_that_are_put_in_place_for_a_call_leave_nothing_behind():
    gc.collect()
    layer, x = make(), gaussian(3, 32)
    count, values = len(held._held), layer.weight.detach()
    for _ in range(3):  # as when a model is offloaded
        layer.weight = torch.nn.Parameter(values.clone())
        call(layer, x)
        layer.weight = torch.nn.Parameter(values.to("meta"))
    gc.collect()
    assert len(held._held) == count
    nm_linear(x, values, layer.weight_meta, None, 2, 4)  # not a layer's own
    assert len(held._held) == count


@pytest.mark.parametrize("change", [NMLinear.double, load])
def test_parameters_can_be_swapped_as_torch_may_be_told_to(change):
    layer, x = make(), gaussian(3, 32)
    call(layer, x)
    gather(gaussian(12, 32), layer.weight_meta, layer.pattern)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        change(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = x.to(layer.weight.dtype)
    assert same_bits(call(layer, x), by_reference(layer, x))


def test_inference_tensors_are_not_held_since_their_changes_are_not_counted():
    with torch.inference_mode():
        layer, x = make(), gaussian(3, 32)
        layer(x)
        layer.weight.mul_(2)
        assert same_bits(layer(x), by_reference(layer, x))
    assert not is_held(layer)


def test_a_graph_that_is_captured_reads_nothing_that_is_held_and_says_so_once(monkeypatch, unpacked, caplog):
    layer, x = make(), gaussian(3, 32, seed=1)
    places = NMLinear.from_linear(torch.nn.Linear(32, 12), PATTERNS[0]).weight_meta
    call(layer, x)
    gather(gaussian(12, 32), places, PATTERNS[0])
    monkeypatch.setattr(held, "_capturing", lambda tensor: True)
    for _ in range(2):
        assert same_bits(call(layer, x), by_reference(layer, x))
    assert len(unpacked) == 3
    assert caplog.text.count("call model.dequantize() first") == 1
    assert held_dense(layer) is None
    assert held.find(("places", 32, PATTERNS[0]), places) is None
    fresh = make()
    call(fresh, x)
    assert not is_held(fresh)


def test_whether_a_graph_is_captured_is_asked_of_the_device_of_the_tensor(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(of):
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    fake = SimpleNamespace(device=device, is_current_stream_capturing=lambda: current[0] == 1)
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch, kind, fake)
        found = [held._capturing(SimpleNamespace(device=torch.device(kind, index))) for index in (0, 1)]
        assert found == [False, True]
    assert not held._capturing(torch.ones(1))


def test_what_is_held_is_finished_before_other_streams_read_it(monkeypatch):
    waited = []
    monkeypatch.setattr(held.measure, "finish", waited.append)
    layer = make()
    for _ in range(2):
        call(layer, gaussian(3, 32))
    assert waited == [[torch.device("cpu")]]


def test_a_compiled_layer_reads_what_is_held(monkeypatch):
    layer, x, linears = make(), gaussian(3, 32, seed=1), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = by_reference(layer, x)
    assert same_bits(call(compiled, x), expected)
    assert not is_held(layer)
    call(layer, x)
    read = held_dense(layer)
    with monkeypatch.context() as patch:
        plain = F.linear
        patch.setattr(F, "linear", lambda *given: linears.append(given[1]) or plain(*given))
        assert same_bits(call(compiled, x), expected)
    assert [weight is read for weight in linears] == [True]
    change_in_place(layer)
    assert same_bits(call(compiled, x), by_reference(layer, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_training_says_nothing(frozen, caplog):
    layer = make().train().requires_grad_(not frozen)
    layer(gaussian(3, 32).requires_grad_()).sum().backward()
    assert not caplog.records


def test_that_dense_weights_are_held_is_said_once(caplog):
    for _ in range(2):
        call(make(), gaussian(3, 32))
    assert caplog.text.count("multiply by dense weights") == 1
    assert "OPTIMUM_EGGS_BACKEND=reference" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_spread_and_gather_by_held_places_give_the_same_bits(pattern, dtype, sorted_out, monkeypatch):
    monkeypatch.setattr(layout, "_NUMBERS", 40)  # a row at a time
    layer, dense = make(pattern=pattern, dtype=dtype), gaussian(12, 32, seed=3, dtype=dtype)
    values, meta, rows = layer.weight.detach().clone(), layer.weight_meta, slice(3, 9)
    values[0, :2] = torch.tensor([-0.0, torch.nan])
    with force("reference"):
        expected = [spread(values, meta, pattern), gather(dense, meta, pattern)]
    sorted_out.clear()
    for _ in range(3):
        assert same_bits(spread(values, meta, pattern), expected[0])
        assert same_bits(gather(dense, meta, pattern), expected[1])
        assert same_bits(spread(values[rows], meta, pattern, rows), expected[0][rows])
        assert same_bits(gather(dense[rows], meta, pattern, rows), expected[1][rows])
    assert len(sorted_out) == 12
    assert held.find(("places", 32, pattern), meta).nbytes == values.numel()  # a byte each


def test_places_are_worked_out_again_when_the_bits_change(sorted_out):
    layer, dense = make(), gaussian(12, 32, seed=3)
    gather(dense, layer.weight_meta, layer.pattern)
    change_bits(layer)
    assert torch.equal(gather(dense, layer.weight_meta, layer.pattern), dense[layer.mask()].view(12, 16))
    assert len(sorted_out) == 2


def gradients(layer, x):
    y = layer(x)
    return y.detach(), *torch.autograd.grad((y * gaussian(*y.shape, seed=4)).sum(), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_steps_sort_once_and_give_the_same_bits(dtype, sorted_out):
    layer, x = make(dtype=dtype).train(), gaussian(3, 32, seed=1, dtype=dtype).requires_grad_()
    with force("reference"):
        expected = gradients(layer, x)
        assert len(sorted_out) == 1
        gradients(layer, x)
        assert len(sorted_out) == 2  # the reference holds nothing
    sorted_out.clear()
    for _ in range(3):
        assert all(map(same_bits, gradients(layer, x), expected))
    assert len(sorted_out) == 1


def test_the_masked_low_rank_product_sorts_once_and_gives_the_same_bits(sorted_out, monkeypatch):
    from optimum_eggs.recovery import low_rank

    monkeypatch.setattr(low_rank, "_CHUNK", 100)  # three rows at a time
    layer = make()
    down, up = gaussian(4, 32, seed=1).requires_grad_(), gaussian(12, 4, seed=2).requires_grad_()

    def run():
        delta = masked_low_rank(down, up, layer.weight_meta, layer.pattern)
        return delta.detach(), *torch.autograd.grad(delta.square().sum(), (down, up))

    with force("reference"):
        expected = run()
    sorted_out.clear()
    for _ in range(3):
        assert all(map(same_bits, run(), expected))
    assert len(sorted_out) == 1


def test_gradients_of_gradients_by_held_places():
    layer = make(dtype=torch.float64).train()
    x = gaussian(2, 32, seed=1, dtype=torch.float64).requires_grad_()
    arguments = (layer.weight_meta, None, 2, 4)
    assert torch.autograd.gradgradcheck(lambda x, w: nm_linear(x, w, *arguments), (x, layer.weight))


def operations(run):
    """Names of the operations of torch that `run` calls."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return {event.name.removeprefix("aten::") for event in profile.function_events}


# What copies from the processor, waits for the device, sorts or takes prefix sums on a GPU.
SLOW = {
    "lift_fresh",
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "cumsum",
    "topk",
    "sort",
}


def test_no_call_after_the_first_copies_from_the_processor_waits_or_sorts():
    layer, x = make(), gaussian(3, 32, seed=1).requires_grad_()
    call(layer, x)
    found = operations(lambda: call(layer, x))
    assert "linear" in found
    assert not found & {*SLOW, "scatter", "zeros", "arange"}
    layer.train()
    gradients(layer, x)
    found = operations(lambda: gradients(layer, x))
    assert {"linear", "scatter", "gather"} <= found
    assert not found & SLOW


def test_not_even_the_reference_copies_from_the_processor_so_that_graphs_capture_it():
    layer, x = make(), gaussian(3, 32, seed=1).requires_grad_()
    with force("reference"):
        found = operations(lambda: gradients(layer, x))
    assert "masked_scatter" in found
    assert not found & {"lift_fresh", "item", "_local_scalar_dense", "nonzero"}
