"""Experts held as 3-D parameters: split, and put together again."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from optimum_eggs.errors import ShapeError
from optimum_eggs.nn.experts import SplitExperts, is_fused_experts, join_experts, split_experts

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def experts_of(name, dtype=torch.float32):
    model = tiny.make_model(name, dtype=dtype)
    model.set_experts_implementation("eager")
    return model.model.layers[0].mlp.experts


def routed(tokens=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, 4, generator=generator).topk(2).indices
    states, weights = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (32, 2))
    return states, chosen, weights


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_split_experts_compute_what_fused_ones_do(name, dtype):
    fused, inputs = experts_of(name, dtype), routed(dtype=dtype)
    assert torch.equal(SplitExperts(fused)(*inputs), fused(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_index_behind_the_last_expert_stands_for_none(name):
    fused, (states, chosen, weights) = experts_of(name), routed()
    none = weights.clone()  # not every transformers' own experts know an index of none, but all know a weight of zero
    none[::3, 0] = 0
    expected = fused(states, chosen, none)
    chosen[::3, 0] = 4
    assert torch.equal(SplitExperts(fused)(states, chosen, weights), expected)


@torch.no_grad()
@pytest.mark.parametrize(("index", "message"), [(-1, "1 values below 0 and 0 above 4"), (5, "0 values below 0 and 1")])
def test_an_index_of_no_expert_is_refused(index, message):
    states, chosen, weights = routed()
    chosen[3, 1] = index
    with pytest.raises(ShapeError, match=f"top_k_index has {message}"):
        SplitExperts(experts_of("mixtral"))(states, chosen, weights)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_no_token_goes_to_and_no_tokens_at_all(name):
    fused, (states, chosen, weights) = experts_of(name), routed()
    chosen = torch.where(chosen == 1, 3, chosen)
    assert torch.equal(SplitExperts(fused)(states, chosen, weights), fused(states, chosen, weights))
    assert SplitExperts(fused)(states[:0], chosen[:0], weights[:0]).shape == (0, 32)


@torch.no_grad()
def test_the_processor_is_waited_for_once_whatever_the_number_of_experts():
    split, inputs = SplitExperts(experts_of("mixtral")), routed()
    with torch.autograd.profiler.profile() as profile:
        split(*inputs)
    names = [event.name for event in profile.function_events]
    assert names.count("aten::linear") == 8
    # Each of these makes a GPU's number of results known to the processor.
    assert not {"aten::nonzero", "aten::_unique2", "aten::item", "aten::masked_select"} & set(names)
    assert names.count("aten::searchsorted") == 1


@torch.no_grad()
def test_experts_without_a_gate():
    fused, (states, chosen, weights) = experts_of("mixtral"), routed()
    fused.has_gate, fused.up_proj = False, torch.nn.Parameter(fused.gate_up_proj[:, :64])
    del fused.gate_up_proj
    assert is_fused_experts(fused)
    one_hot = torch.zeros(len(states), 4).scatter_(1, chosen, weights)
    hidden = fused.act_fn(torch.einsum("td,eid->tei", states, fused.up_proj))
    expected = torch.einsum("tei,edi,te->td", hidden, fused.down_proj, one_hot)
    torch.testing.assert_close(SplitExperts(fused)(states, chosen, weights), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_splitting_copies_nothing_and_joining_gives_back_every_bit(name):
    model = tiny.make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held = {value.untyped_storage().data_ptr() for value in model.parameters()}
    fused = split_experts(model)
    assert sorted(fused) == [f"model.layers.{block}.mlp.experts" for block in (0, 1)]
    assert {value.untyped_storage().data_ptr() for value in model.parameters()} == held
    join_experts(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_weights_that_stay_get_memory_of_their_own():
    split = SplitExperts(experts_of("gpt_oss"))
    before = {key: value.clone() for key, value in split.state_dict().items()}
    split.own_memory()
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in split.parameters())
    assert all(torch.equal(value, before[key]) for key, value in split.state_dict().items())


def test_a_copy_of_split_experts_is_on_its_own():
    split = SplitExperts(experts_of("mixtral"))
    twin = copy.deepcopy(split)
    with torch.no_grad():
        split.get_parameter("0.down_proj.weight").zero_()
    assert bool(twin.get_parameter("0.down_proj.weight").any())


def test_other_modules_are_no_fused_experts():
    model = tiny.make_model("mixtral")
    found = [name for name, module in model.named_modules() if is_fused_experts(module)]
    assert found == [f"model.layers.{block}.mlp.experts" for block in (0, 1)]
    assert not any(is_fused_experts(module) for module in tiny.make_model("llama").modules())
