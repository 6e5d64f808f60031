"""Layers of integers as modules: casts, copies, state dicts, and the way there and back."""

import copy

import pytest
import torch
from oracles import gaussian
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.errors import ShapeError
from optimum_eggs.nn import CodedEmbedding, CodedLinear, RoundedLinear, coded_modules, is_packed
from optimum_eggs.nn.embedding import TiedCodedLinear
from optimum_eggs.ops import explain, force
from optimum_eggs.packing.codes import Coding
from optimum_eggs.update.rounding import nearest

TWO_OF_FOUR = NMPattern(2, 4)


def packed(kind="int8", bias=True, conv=False, rows=24, columns=128):
    torch.manual_seed(0)
    dense = Conv1D(rows, columns) if conv else nn.Linear(columns, rows, bias)
    layer = NMLinear.from_linear(dense.requires_grad_(False), TWO_OF_FOUR)
    coding = Coding(kind, 64)
    mask = layer.mask()
    codes, scale = nearest(layer.dense_weight(), coding)
    return layer, CodedLinear.from_codes(layer, codes[mask].view(rows, -1), scale, coding)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("conv", [False, True])
def test_it_is_the_dense_layer_of_its_values(kind, conv):
    layer, coded = packed(kind, conv=conv)
    assert torch.equal(coded.mask(), layer.mask())
    assert not bool(coded.dense_weight()[~coded.mask()].any())
    x = gaussian(12, 128)
    dense = coded.to_original()
    assert type(dense) is (Conv1D if conv else nn.Linear)
    torch.testing.assert_close(coded(x), dense(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(coded.to_packed().dense_weight(), coded.dense_weight())


def test_casting_leaves_codes_and_scales_as_they_are():
    _, coded = packed()
    before = {name: value.clone() for name, value in coded.state_dict().items()}
    for cast in (lambda: coded.to(torch.float16), coded.half, coded.double, coded.float):
        cast()
        now = coded.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items() if name != "bias")
        assert now["weight_scale"].dtype == torch.bfloat16
    assert coded.to(torch.bfloat16)(gaussian(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_it_comes_back_from_a_state_dict_and_a_copy(kind):
    _, coded = packed(kind)
    x = gaussian(2, 128)
    other = CodedLinear(128, 24, True, TWO_OF_FOUR, Coding(kind, 64))
    other.load_state_dict(coded.state_dict())
    assert torch.equal(other(x), coded(x))
    assert torch.equal(copy.deepcopy(coded)(x), coded(x))


def test_no_optimiser_moves_integers():
    _, coded = packed()
    assert not coded.weight.requires_grad
    x = gaussian(3, 128).requires_grad_()
    coded(x).sum().backward()
    assert coded.weight.grad is None
    assert x.grad is not None


def test_what_does_not_fit_is_refused():
    layer, coded = packed()
    with pytest.raises(ShapeError, match=r"codes \(24, 63\).*must be \(24, 64\)"):
        CodedLinear.from_codes(layer, torch.zeros(24, 63, dtype=torch.int8), coded.weight_scale, coded.coding)
    with pytest.raises(ShapeError, match="multiple of m"):
        CodedLinear(126, 24, True, TWO_OF_FOUR)
    dense = CodedLinear(128, 24, pattern=None)
    with pytest.raises(ShapeError, match="keeps all its values"):
        dense.to_packed()


def test_what_it_says_of_itself():
    _, coded = packed("int4")
    assert "pattern=2:4, values=int4, group=64" in repr(coded)
    assert is_packed(coded)
    assert not is_packed(CodedLinear(128, 24, pattern=None))


def steps_of(coded):
    """Of every value, how far it is to the next."""
    return coded.weight_scale.float().repeat_interleave(coded.coding.per_scale(TWO_OF_FOUR), 1)


def encoded(coded, values):
    """A copy of the layer with these values, and their distance."""
    other = copy.deepcopy(coded)
    other.weight.data, other.weight_scale, distance = coded.encode(values)
    return other, distance


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_values_that_codes_stand_for_are_encoded_as_they_are(kind):
    _, coded = packed(kind)
    other, distance = encoded(coded, coded.kept_values())
    assert torch.equal(other.weight, coded.weight)
    assert torch.equal(other.weight_scale, coded.weight_scale)
    assert distance == 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_values_are_encoded_with_the_distance_that_is_stated_and_the_same_each_time(kind):
    layer, coded = packed(kind)
    values = layer.weight.detach()
    other, distance = encoded(coded, values)
    assert (other.kept_values() - values).abs().le(steps_of(coded) * 1.01).all()
    assert distance == pytest.approx(float((other.kept_values() - values).norm() / values.norm()))
    assert torch.equal(other.weight, coded.encode(values)[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("part", [0.02, 0.4])
def test_changes_smaller_than_half_a_step_are_there_on_average(kind, part):
    _, coded = packed(kind, rows=768)
    change = steps_of(coded) * part * torch.randn(768, 64, generator=torch.Generator().manual_seed(1)).sign()
    other, _ = encoded(coded, coded.kept_values() + change)
    found = other.kept_values() - coded.kept_values()
    share = float((found / steps_of(coded) * change.sign()).mean()) / part
    assert 0.8 < share < 1.2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_group_takes_another_scale_only_where_its_values_do_not_fit(kind):
    _, coded = packed(kind)
    values = coded.kept_values()
    values[0] *= 3  # both groups of the row
    other, _ = encoded(coded, values)
    torch.testing.assert_close(other.weight_scale[0], 3 * coded.weight_scale[0], rtol=0.2, atol=0)
    assert torch.equal(other.weight_scale[1:], coded.weight_scale[1:])
    assert torch.equal(other.weight[1:], coded.weight[1:])
    assert float((other.kept_values()[0] - values[0]).norm() / values[0].norm()) < (0.02 if kind == "int8" else 0.25)


def test_a_group_of_zeros_takes_a_scale_that_its_values_need():
    _, coded = packed()
    coded.weight.data[0], coded.weight_scale[0] = 0, 0
    values = coded.kept_values()
    assert not encoded(coded, values)[0].weight_scale[0].any()
    values[0] = 1
    torch.testing.assert_close(encoded(coded, values)[0].kept_values()[0], values[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_layer_that_trains_computes_with_its_values_rounded(kind):
    _, coded = packed(kind)
    training = RoundedLinear.from_coded(coded)
    x = gaussian(12, 128)
    torch.testing.assert_close(training(x), coded(x), rtol=1e-5, atol=1e-5)
    optimiser = torch.optim.SGD([training.weight, training.weight_scale], lr=0.05)
    for _ in range(5):
        training(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = training.to_coded()
    assert not torch.equal(after.weight, coded.weight)
    assert torch.equal(after.mask(), coded.mask())
    torch.testing.assert_close(training(x), after(x), rtol=1e-5, atol=1e-5)


def embedding(kind="int8", dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Embedding(30, 80, padding_idx=0, dtype=dtype)
    coding = Coding(kind, 64)
    codes, scale = nearest(dense.weight.detach().float(), coding)
    return dense, CodedEmbedding.from_codes(dense, codes, scale, coding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_gives_the_dtype_of_the_model(dtype):
    dense, coded = embedding(dtype=dtype)
    ids = torch.tensor([[3, 0], [29, 3]])
    found = coded(ids)
    assert found.shape == (2, 2, 80)
    assert found.dtype == dtype
    torch.testing.assert_close(found, dense(ids), rtol=0.02, atol=0.02)
    assert torch.equal(coded.to_embedding()(ids), found)
    coded.to(torch.float16)
    assert coded(ids).dtype == torch.float16
    assert coded.weight_scale.dtype == torch.bfloat16


def test_ids_that_are_none_are_refused_as_a_dense_embedding_does():
    _, coded = embedding()
    for wrong in (-1, 30):
        with pytest.raises(IndexError):
            coded(torch.tensor([wrong]))


def tied():
    _, coded = embedding()
    head = TiedCodedLinear(nn.Linear(80, 30, bias=False), coded)
    return nn.ModuleDict({"embedding": coded, "head": head})


def right(model):
    """Whether the head multiplies by the embeddings as they are now."""
    x = gaussian(12, 80)
    expected = x @ model["embedding"].dense_weight().t()
    return torch.allclose(model["head"](x), expected, rtol=1e-5, atol=1e-5)


def test_a_head_shares_the_embeddings_codes():
    model = tied()
    assert list(coded_modules(model)) == ["embedding"]
    assert list(model.state_dict()) == ["embedding.weight", "embedding.weight_scale", "head.weight"]
    assert right(model)
    assert right(copy.deepcopy(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_head_follows_embeddings_that_are_loaded_or_moved(assign):
    model = tied()
    other = {name: value.clone() for name, value in model.state_dict().items()}
    other["embedding.weight_scale"] *= 2
    model.load_state_dict(other, assign=assign)
    assert right(model)
    clone = copy.deepcopy(model)
    clone["embedding"].weight_scale = clone["embedding"].weight_scale * 3
    assert right(clone)
    assert right(model)
    model.to(torch.bfloat16).to(torch.float32)
    assert right(model)
    empty = tied().to("meta").to_empty(device="cpu")
    empty.load_state_dict(other)
    assert right(empty)


def test_what_is_no_number_of_the_model_is_refused():
    _, coded = packed()
    with pytest.raises(ShapeError, match=r"got inputs of torch.int8; a model that casts its hidden states"):
        coded(torch.ones(1, 128, dtype=torch.int8))
    coded.weight = nn.Parameter(torch.ones(24, 64))
    with pytest.raises(ShapeError, match=r"codes of int8 are of torch.int8, and these are of torch.float32"):
        coded(gaussian(12, 128))


def test_four_bits_need_an_even_number_of_values():
    with pytest.raises(ShapeError, match="rows of 5 values, an odd number, cannot be int4:128; use int8"):
        CodedLinear(20, 3, pattern=NMPattern(1, 4), coding=Coding("int4"))


def test_derivatives_of_every_kind():
    _, coded = packed()
    x, tangent = gaussian(3, 128), gaussian(3, 128, seed=2)
    dense = coded.to_linear()
    _, found = torch.func.jvp(coded, (x,), (tangent,))
    torch.testing.assert_close(found, tangent @ dense.weight.t(), rtol=1e-4, atol=1e-5)
    gradient = torch.func.grad(lambda x: coded(x).square().sum())(x)
    expected = torch.func.grad(lambda x: dense(x).square().sum())(x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_replica_whose_tensors_are_attributes_runs():
    # as torch.nn.DataParallel makes them
    _, coded = packed()
    replica = coded._replicate_for_data_parallel()
    replica.weight, replica.bias = coded.weight.detach(), coded.bias.detach()
    x = gaussian(2, 128)
    assert torch.equal(replica(x), coded(x))


def test_what_runs_is_explained():
    _, coded = packed()
    with force("reference"):
        assert explain(coded, 1).why.startswith("values are made of the integers at every call")
    with force("dense"):  # as on a GPU
        assert explain(coded, 1).backend == "reference"
        assert explain(coded, 1).why.endswith("nothing is held")


def test_rows_of_a_large_head_are_multiplied_some_at_a_time(monkeypatch):
    model = tied()
    expected = model["head"](gaussian(12, 80))
    monkeypatch.setattr("optimum_eggs.ops.coded_linear._NUMBERS", 80 * 7)
    x = gaussian(12, 80).requires_grad_()
    found = model["head"](x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close(x.grad, model["embedding"].dense_weight().sum(0).expand(12, 80))
