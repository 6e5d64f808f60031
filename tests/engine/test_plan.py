from __future__ import annotations

import re

import pytest
import tiny
import torch
import transformers

from optimum_eggs import EGGSConfig, NMLinear, NMPattern
from optimum_eggs.engine import make_plan
from optimum_eggs.errors import ConfigError, ModelError, NumericalError, ShapeError


def plan(model, **changes):
    return make_plan(model, EGGSConfig("2:4", **({"band": 8} | changes)))


def test_all_linears_of_the_blocks_are_pruned_and_the_rest_is_named():
    found = plan(tiny.make_model("opt"))
    assert len(found.names) == 12
    reasons = {layer.name: layer.reason for layer in found.left_dense}
    assert reasons["lm_head"] == "matches `ignore`"
    assert reasons["model.decoder.project_in"] == "outside the list of blocks"
    assert reasons["model.decoder.embed_tokens.weight"] == "an Embedding, not a linear"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_held_as_one_parameter_are_split(name):
    found = plan(tiny.make_model(name))
    assert {name for name in found.names if "experts" in name} == {
        f"model.layers.{block}.mlp.experts.{expert}.{part}"
        for block in (0, 1)
        for expert in range(4)
        for part in ("gate_up_proj", "down_proj")
    }
    assert not any("experts" in layer.name for layer in found.left_dense)


def test_experts_that_stay_dense_stay_one_module():
    model = tiny.make_model("mixtral")
    before = dict(model.named_modules())
    found = plan(model, ignore=["experts"])
    assert all("self_attn" in layer for layer in found.names)
    left = {layer.name: layer for layer in found.left_dense}
    experts = left["model.layers.1.mlp.experts"]
    assert experts.reason == "matches `ignore`"
    assert experts.parameters == sum(p.numel() for p in before["model.layers.1.mlp.experts"].parameters())
    assert dict(model.named_modules()) == before


def test_a_plan_that_fails_leaves_the_experts_as_they_were():
    model = tiny.make_model("mixtral")
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match="matches no linear layer"):
        plan(model, targets=["no_such_layer"])
    assert dict(model.named_modules()) == before


def test_experts_with_a_norm_of_their_own_are_left_dense_and_named():
    model = tiny.make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    found = plan(model)
    experts = [layer for layer in found.left_dense if layer.reason == "holds experts as one 3-D parameter"]
    assert [layer.name for layer in experts] == [
        f"model.layers.{block}.mlp.experts.{part}" for block in (0, 1) for part in ("gate_up_proj", "down_proj")
    ]
    assert all(layer.parameters > 0 for layer in experts)
    assert all("self_attn" in layer for layer in found.names)


def gated(name):
    """A tiny model with experts, and what is beside them there."""
    experts = tiny._MOE | {"num_experts": 16}
    if name == "qwen2_moe":  # also in Qwen3-Next: a gate of one output on the expert that all tokens see
        config = transformers.Qwen2MoeConfig(**tiny._LLAMA, **experts, shared_expert_intermediate_size=32)
        return transformers.Qwen2MoeForCausalLM(config), "shared_expert_gate"
    config = transformers.AfmoeConfig(**tiny._LLAMA, **experts, head_dim=8, num_dense_layers=0)
    return transformers.AfmoeForCausalLM(config), "router.gate"


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen2_moe", "only 1 output, as gates have"), ("afmoe", "a router of experts")]
)
def test_gates_and_routers_stay_dense_unless_they_are_named(name, reason):
    model, layer = gated(name)
    layers = [f"model.layers.{block}.mlp.{layer}" for block in (0, 1)]
    for targets in (None, ["mlp"], ["*.mlp.*"]):  # a module around them is no name of theirs
        found = plan(model, targets=targets)
        assert [left.name for left in found.left_dense if left.reason == reason] == layers
        assert not set(layers) & set(found.names)
        assert any("shared_expert" in pruned for pruned in found.names)
    named = make_plan(model, EGGSConfig("2:4", preset="magnitude", targets=[layer]))
    assert named.names == layers


def mixture(name):
    """A tiny model with 16 experts whose router is none of one linear layer with 16 outputs."""
    small = {key: tiny._LLAMA[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")}
    if name == "zaya":
        sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "router_hidden_size": 32}
        experts = {"num_experts": 16, "moe_intermediate_size": 32}
        return transformers.ZayaForCausalLM(transformers.ZayaConfig(**small, **sizes, **experts))
    if name == "longcat":
        ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "head_dim"), 16)
        experts = {"n_routed_experts": 16, "zero_expert_num": 8, "expert_ffn_hidden_size": 32, "moe_topk": 2}
        config = transformers.LongcatFlashConfig(
            **small, **ranks, **experts, num_layers=2, v_head_dim=16, ffn_hidden_size=64
        )
        return transformers.LongcatFlashForCausalLM(config)
    experts = {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 32}
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 16}
    layers = {"vocab_size_per_layer_input": 256, "layer_types": ["full_attention"]}
    config = transformers.Gemma4TextConfig(**tiny._LLAMA | {"num_hidden_layers": 1}, **experts, **sizes, **layers)
    return transformers.Gemma4ForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("zaya", ["mlp.gate.down_proj", *(f"mlp.gate.router_mlp.{part}" for part in ("fc1", "fc2", "out_proj"))]),
        ("longcat", ["mlp.router.classifier"]),  # of 16 experts and 8 that do nothing
        ("gemma4", ["router.proj"]),  # beside a gate of 16 outputs that is no router
    ],
)
def test_all_layers_of_a_router_stay_dense_and_nothing_else_does(name, routers):
    if not hasattr(transformers, {"zaya": "Zaya", "longcat": "LongcatFlash", "gemma4": "Gemma4Text"}[name] + "Config"):
        pytest.skip("this transformers does not know it")
    found = plan(mixture(name), min_degree=0)
    assert [
        left.name for left in found.left_dense if left.name.startswith("model.layers.0.") and "router" in left.reason
    ] == [f"model.layers.0.{router}" for router in routers]
    assert not any(router in name for router in routers for name in found.names)


def test_a_layer_that_a_router_and_experts_have_is_the_experts_unless_both_are_named():
    if not hasattr(transformers, "ZayaConfig"):
        pytest.skip("this transformers does not know it")
    model = mixture("zaya")
    found = plan(model, targets=["down_proj"], min_degree=0)
    assert len(found.names) == 32
    assert all(".experts." in name for name in found.names)
    found = make_plan(mixture("zaya"), EGGSConfig("2:4", preset="magnitude", targets=["gate.down_proj"]))
    assert found.names == [f"model.layers.{block}.mlp.gate.down_proj" for block in (0, 1)]


def test_a_convolution_is_called_what_it_is():
    model = tiny.make_model("llama")
    model.model.layers[0].self_attn.conv = torch.nn.Conv1d(4, 4, 2)
    reasons = {layer.name: layer.reason for layer in plan(model).left_dense}
    assert reasons["model.layers.0.self_attn.conv.weight"] == "a Conv1d, not a linear"


def test_a_gate_that_is_named_and_cannot_keep_the_floor_is_refused():
    model, layer = gated("qwen2_moe")
    with pytest.raises(ShapeError, match=r"layers.0.mlp.shared_expert_gate: min_degree=1 cannot hold at 2:4: 1 rows"):
        plan(model, targets=[layer])


def test_targets_and_ignore_choose_by_name():
    model = tiny.make_model("llama")
    assert plan(model, targets=["down_proj"]).names == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert all("layers.0" not in name for name in plan(model, ignore=["layers.0", "lm_head"]).names)
    reasons = {layer.name: layer.reason for layer in plan(model, targets=["down_proj"]).left_dense}
    assert reasons["model.layers.0.mlp.up_proj"] == "not in `targets`"


@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused(key):
    with pytest.raises(ConfigError, match=rf"{key}: the pattern 'downproj' matches no linear layer"):
        plan(tiny.make_model("llama"), **{key: ["downproj"]})


def test_a_target_outside_the_blocks_is_refused():
    with pytest.raises(ConfigError, match="matches lm_head, which is outside the list of blocks"):
        plan(tiny.make_model("llama"), targets=["lm_head"], ignore=[])


def test_nothing_to_prune_is_refused():
    with pytest.raises(ModelError, match="there is nothing to prune"):
        plan(tiny.make_model("llama"), targets=["down_proj"], ignore=["down_proj"])


def test_a_layer_that_m_does_not_divide_is_named_with_the_remedy():
    model = tiny.make_model("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(66, 32)
    message = "model.layers.1.mlp.down_proj: in_features=66 is not a multiple of m=4; leave them dense with ignore="
    remedy = "['lm_head', 'layers.1.mlp.down_proj'] (--ignore lm_head layers.1.mlp.down_proj)"
    with pytest.raises(ShapeError, match=re.escape(message + remedy)):
        plan(model)
    assert len(plan(model, ignore=["layers.1.mlp.down_proj", "lm_head"]).names) == 13


def test_all_layers_that_m_does_not_divide_are_named_at_once_with_what_to_ignore():
    model = tiny.make_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = torch.nn.Linear(66, 32)
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(34, 32)
    ignore = ["lm_head", "layers.0.self_attn.o_proj", "down_proj"]
    with pytest.raises(ShapeError) as caught:
        plan(model)
    said = str(caught.value)
    names = ["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert said.startswith(
        ", ".join(f"model.{name}" for name in names) + ": in_features=34 and 66 is not a multiple of"
    )
    assert f"ignore={ignore} (--ignore {' '.join(ignore)})" in said
    assert len(plan(model, ignore=ignore).names) == 11


def test_a_layer_too_small_for_the_floor_is_named():
    with pytest.raises(ShapeError, match=r"layers.0.self_attn.q_proj: min_degree=5 cannot hold at 1:8: 32 rows keep"):
        make_plan(tiny.make_model("llama"), EGGSConfig("1:8", min_degree=5, band=64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = tiny.make_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = value
    with pytest.raises(NumericalError, match=r"model.layers.1.self_attn.v_proj: the weight holds NaN or infinite"):
        plan(model)


def test_a_packed_model_is_refused():
    model = tiny.make_model("llama")
    block = model.model.layers[0].mlp
    block.up_proj = NMLinear.from_linear(block.up_proj, NMPattern(2, 4))
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj: is packed already"):
        plan(model)


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(ModelError, match=r"not in memory \(device meta\)"):
        plan(tiny.make_model("llama").to("meta"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_under_adapters_is_refused(wrapped):
    peft = pytest.importorskip("peft")
    model, lora = tiny.make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"])
    if wrapped:
        model = peft.get_peft_model(model, lora)
    else:
        peft.inject_adapter_in_model(lora, model)  # as `add_adapter` does
    with pytest.raises(ModelError, match=r"is under an adapter.*merge_and_unload\(\)"):
        plan(model)
    if wrapped:
        assert plan(model.merge_and_unload()).names
