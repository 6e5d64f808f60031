import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import gaussian, loop_topn, random_mask, same_bits
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_eggs.errors import ShapeError
from optimum_eggs.nn import NMLinear, dense_weight, is_dense_linear
from optimum_eggs.pattern import NMPattern

pytestmark = pytest.mark.usefixtures("reference_backend")
TWO_OF_FOUR = NMPattern(2, 4)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def linear(columns=24, rows=10, bias=True, dtype=torch.float32):
    layer = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    layer.weight.data = gaussian(rows, columns, dtype=dtype)
    if bias:
        layer.bias.data = gaussian(rows, seed=1, dtype=dtype)
    return layer


def conv1d(columns=24, rows=10):
    layer = Conv1D(rows, columns)
    layer.weight.data = gaussian(columns, rows)
    layer.bias.data = gaussian(rows, seed=1)
    return layer


def packed(**shape):
    return NMLinear.from_linear(linear(**shape), TWO_OF_FOUR)


def top_of(layer):
    """The dense weight under its magnitude mask, by a loop."""
    weight = dense_weight(layer).contiguous()  # a Conv1D's is a transposed view: products sum it in another order
    return weight * loop_topn(weight.abs(), 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (1, 2, 3), (0,), (2, 0)])
def test_forward_is_the_dense_layer_bit_for_bit(dtype, bias, batch):
    dense = linear(bias=bias, dtype=dtype)
    x = gaussian(*batch, 24, seed=2, dtype=dtype)
    found = NMLinear.from_linear(dense, TWO_OF_FOUR)(x)
    assert found.shape == (*batch, 10)
    assert same_bits(found, F.linear(x, top_of(dense), dense.bias))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (6, 8), (5, 16), (31, 32)])
def test_forward_is_the_dense_layer_for_other_patterns(n, m):
    mask = random_mask(10, 32, n, m)
    dense = linear(columns=32)
    x = gaussian(3, 32)
    found = NMLinear.from_linear(dense, NMPattern(n, m), mask)(x)
    assert same_bits(found, F.linear(x, dense.weight * mask, dense.bias))


def test_without_a_mask_the_largest_magnitudes_stay():
    dense = linear()
    layer = NMLinear.from_linear(dense, TWO_OF_FOUR)
    assert torch.equal(layer.dense_weight(), top_of(dense))
    assert torch.equal(layer.mask(), loop_topn(dense.weight.abs(), 2, 4))


def test_a_mask_given_is_the_mask_held():
    mask, dense = random_mask(10, 24, 2, 4), linear()
    layer = NMLinear.from_linear(dense, TWO_OF_FOUR, mask)
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.dense_weight(), dense.weight * mask)


def test_a_weight_given_takes_the_place_of_the_layers_own():
    mask, weight = random_mask(10, 24, 2, 4), gaussian(10, 24, seed=3, dtype=torch.float64)
    layer = NMLinear.from_linear(linear(dtype=torch.bfloat16), TWO_OF_FOUR, mask, weight)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.dense_weight(), weight.bfloat16() * mask)


def test_the_dense_layer_is_left_alone():
    dense = linear()
    before = copy.deepcopy(dense.state_dict())
    NMLinear.from_linear(dense, TWO_OF_FOUR).weight.data.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_a_conv1d_is_packed_by_outputs():
    conv, x = conv1d(), gaussian(3, 24, seed=2)
    layer = NMLinear.from_linear(conv, TWO_OF_FOUR)
    assert layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (24, 10)
    assert same_bits(layer(x), F.linear(x, top_of(conv), conv.bias))


def test_to_linear_holds_the_zeros_in_place():
    layer, x = packed(), gaussian(3, 24, seed=2)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, layer.dense_weight())
    assert same_bits(dense(x), layer(x))


def test_to_linear_shares_no_memory():
    layer = packed()
    before = layer.bias.clone()
    layer.to_linear().bias.data.zero_()
    assert torch.equal(layer.bias, before)


def test_to_original_of_a_linear_is_a_linear():
    assert type(packed().to_original()) is nn.Linear


def test_to_original_of_a_conv1d_is_a_conv1d():
    conv, x = conv1d(), gaussian(3, 24, seed=2)
    again = NMLinear.from_linear(conv, TWO_OF_FOUR).to_original()
    assert type(again) is Conv1D
    assert torch.equal(again.weight, top_of(conv).t())
    assert torch.equal(again.bias, conv.bias)
    assert again(x).shape == (3, 10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_fills_a_new_layer(bias):
    layer, x = packed(bias=bias), gaussian(3, 24, seed=2)
    again = NMLinear(24, 10, bias=bias)
    again.load_state_dict(layer.state_dict())
    assert same_bits(again(x), layer(x))


def test_the_state_dict_holds_the_packed_form_alone():
    shapes = {name: tuple(tensor.shape) for name, tensor in packed().state_dict().items()}
    assert shapes == {"weight": (10, 12), "weight_meta": (10, 3), "bias": (10,)}


def test_it_is_a_linear_layer_to_tools_but_is_not_packed_twice():
    layer = packed()
    assert isinstance(layer, nn.Linear)
    assert not is_dense_linear(layer)


@pytest.mark.parametrize("asks", [True, False])
def test_its_parameters_ask_for_gradients_as_those_of_the_dense_layer_do(asks):
    layer = NMLinear.from_linear(linear().requires_grad_(asks), TWO_OF_FOUR)
    for each in (layer, layer.to_linear()):
        assert [parameter.requires_grad for parameter in each.parameters()] == [asks, asks]
    assert NMLinear(8, 4).weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    layer = NMLinear.from_linear(linear().train(training), TWO_OF_FOUR)
    assert layer.training is layer.to_linear().training is training


def gradients(forward, x, *parameters):
    x = x.clone().requires_grad_()
    (forward(x) * gaussian(*x.shape[:-1], 10, seed=4)).sum().backward()
    return x.grad, *(parameter.grad for parameter in parameters)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (1, 2, 3), (0,), (2, 0)])
def test_gradients_are_those_of_the_dense_layer(batch):
    layer = packed().requires_grad_()
    dense, x = layer.to_linear(), gaussian(*batch, 24, seed=2)
    of_x, of_weight, of_bias = gradients(layer, x, layer.weight, layer.bias)
    dense_x, dense_w, dense_b = gradients(dense, x, dense.weight, dense.bias)
    assert torch.equal(of_x, dense_x)
    assert torch.equal(of_weight, dense_w[layer.mask()].view(10, 12))
    assert torch.equal(of_bias, dense_b)
    assert bool(of_x.any()) == bool(x.numel())


def test_gradients_reach_x_through_a_frozen_layer():
    layer, x = packed().requires_grad_(False), gaussian(3, 24, seed=2)
    (of_x,) = gradients(layer, x)
    # One product, the same on both sides.
    assert torch.equal(of_x, gaussian(3, 10, seed=4) @ layer.dense_weight())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(twin_of):
    layer, x = packed(), gaussian(3, 24, seed=2)
    expected = layer(x)
    twin = twin_of(layer)
    layer.weight.data.zero_()
    layer.weight_meta.zero_()
    assert same_bits(twin(x), expected)
    assert twin.pattern == TWO_OF_FOUR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_dtype_leaves_the_bits_alone(dtype):
    layer = packed()
    dense, meta = layer.dense_weight(), layer.weight_meta.clone()
    layer.to(dtype)
    assert (layer.weight.dtype, layer.bias.dtype, layer.weight_meta.dtype) == (dtype, dtype, torch.uint8)
    assert torch.equal(layer.weight_meta, meta)
    assert torch.equal(layer.dense_weight(), dense.to(dtype))


def test_it_says_what_it_is():
    assert repr(packed()) == "NMLinear(in_features=24, out_features=10, bias=True, pattern=2:4)"


def test_it_can_be_made_without_memory():
    layer = NMLinear(24, 10, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert (layer.weight.shape, layer.weight_meta.shape) == ((10, 12), (10, 3))


class Odd(nn.Linear):
    """A linear layer whose forward may do anything."""


@pytest.mark.parametrize("layer", [Odd(8, 4), nn.Embedding(8, 4), nn.Identity()])
def test_layers_of_other_kinds_are_refused(layer):
    assert not is_dense_linear(layer)
    with pytest.raises(ShapeError, match=f"{type(layer).__name__} is not a dense linear layer; pass an nn.Linear or a"):
        NMLinear.from_linear(layer, TWO_OF_FOUR)


def test_an_input_that_m_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match="in_features=10 is not a positive multiple of m=4"):
        NMLinear(10, 3)
    with pytest.raises(ShapeError, match="in=10, which is not a multiple of m=4"):
        NMLinear.from_linear(nn.Linear(10, 3), TWO_OF_FOUR)


@pytest.mark.parametrize(
    ("mask", "weight", "message"),
    [
        (random_mask(10, 12, 2, 4), None, r"weight \(10, 24\) and mask \(10, 12\) must both be"),
        (random_mask(10, 24, 1, 4), None, r"mask keeps 1 of the 4 positions of row 0, group 0; 2:4 keeps exactly 2"),
        (None, torch.ones(24, 10), r"weight \(24, 10\) and mask \(10, 24\) must both be"),
    ],
)
def test_a_mask_or_weight_that_does_not_fit_is_refused(mask, weight, message):
    with pytest.raises(ShapeError, match=message):
        NMLinear.from_linear(linear(), TWO_OF_FOUR, mask, weight)


def test_a_symbolic_trace_keeps_the_layer_whole():
    model = nn.Sequential(nn.Linear(16, 16), NMLinear.from_linear(nn.Linear(16, 6), NMPattern(2, 4)), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    (call,) = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert call.target.__name__ == "nm_linear"
    x = gaussian(3, 16)
    assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), model(x))
