"""Packing what is N:M already: no value changes, on the way in and out."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import same_bits
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSPruner, NMLinear, NMPattern
from optimum_eggs.errors import ConfigError, ModelError, NumericalError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.masks import topn_mask
from optimum_eggs.nn import dense_weight, is_dense_linear
from optimum_eggs.nn.experts import has_split_experts, join_experts, split_experts


@torch.no_grad()
def sparse_model(name, pattern_of, dtype=torch.float32):
    """A model in which a mask multiplied each linear layer, as other tools leave it; its zeros have signs."""
    model = tiny.make_model(name, dtype=dtype)
    split_experts(model)
    for layer_name, module in model.named_modules():
        pattern = pattern_of(layer_name)
        if is_dense_linear(module) and pattern and "lm_head" not in layer_name:
            weight = dense_weight(module)
            weight.copy_(weight * topn_mask(weight.abs().float(), NMPattern.parse(pattern)))
    join_experts(model)
    return model


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_values(left, right):
    """Equal, and bit for bit but for the sign of zeros, which the packed form does not keep."""
    return left.keys() == right.keys() and all(same_bits(left[name] + 0.0, right[name] + 0.0) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "6:8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_of_one_pattern_comes_back_with_every_value(name, pattern, dtype, tokenizer, tmp_path):
    model = sparse_model(name, lambda _: pattern, dtype)
    before = weights_of(model)
    model.save_pretrained(tmp_path / "sparse")
    pruner = EGGSPruner.from_pretrained(tmp_path / "sparse", tokenizer)
    report = pruner.pack()
    assert {layer.pattern for layer in report.layers} == {pattern}
    assert (report.config["n"], report.config["m"]) == (NMPattern.parse(pattern).n, NMPattern.parse(pattern).m)
    pruner.save_pretrained(tmp_path / "packed")

    found = inspect_checkpoint(tmp_path / "packed")
    assert found.ok
    assert {layer.name: layer.certificate for layer in found.layers} == {
        layer.name: layer.certificate for layer in report.layers
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(module, NMLinear) for module in loaded.modules()) == len(report.layers)
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "dense")
    assert same_values(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), before)


def test_what_is_kept_is_kept_bit_for_bit(tmp_path):
    model = sparse_model("llama", lambda _: "2:4")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[0, :8] = torch.tensor([0.0, -0.0, -1.5, 0.0, -0.0, 1e-42, 0.0, 0.0])
    EGGSPruner(model).pack()
    layer = model.model.layers[0].mlp.up_proj
    assert same_bits(layer.weight[0, :4].detach(), torch.tensor([-0.0, -1.5, -0.0, 1e-42]))


def test_patterns_are_mixed_and_what_is_none_stays_dense(dense_folder, tmp_path):
    def pattern_of(name):
        return None if name.endswith("1.mlp.up_proj") else "4:8" if "self_attn" in name else "2:4"

    model = sparse_model("llama", pattern_of)
    before = weights_of(model)
    report = EGGSPruner(model).pack()
    patterns = {layer.name: layer.pattern for layer in report.layers}
    assert len(patterns) == 13
    assert all(pattern_of(name) == pattern for name, pattern in patterns.items())
    assert (report.config["n"], report.config["m"]) == (2, 4)  # most weights are in the MLPs
    reasons = {layer.name: layer.reason for layer in report.left_dense}
    assert reasons["model.layers.1.mlp.up_proj"] == "its zeros do not follow any usual N:M pattern"
    assert reasons["lm_head"] == "matches `ignore`"
    assert same_values(weights_of(model.dequantize()), before)


def test_the_list_of_blocks_may_be_named():
    model = sparse_model("llama", lambda _: "2:4")
    with pytest.raises(ConfigError, match="is no list of blocks of this model"):
        EGGSPruner(model).pack(block_list="model.none")
    assert len(EGGSPruner(model).pack(block_list="model.layers").layers) == 14


def test_one_pattern_can_be_asked_for():
    model = sparse_model("llama", lambda name: "1:4" if "mlp" in name else "4:8")
    report = EGGSPruner(model).pack("2:4")
    assert {layer.pattern for layer in report.layers} == {"2:4"}
    assert {layer.name.split(".")[3] for layer in report.layers} == {"mlp"}
    assert all(layer.zeros_kept >= layer.out_features * layer.in_features // 4 for layer in report.layers)
    reasons = {layer.name: layer.reason for layer in report.left_dense}
    assert reasons["model.layers.0.self_attn.q_proj"] == "its zeros do not follow 2:4"


def test_what_only_a_pruning_knows_is_not_claimed():
    report = EGGSPruner(sparse_model("llama", lambda _: "2:4")).pack()
    stored = report.to_dict()
    assert stored["calibration"] == {}
    assert stored["summary"]["mean_relative_error"] is None
    assert stored["summary"]["zeros_kept"] == 0
    assert all(layer["relative_error"] is None and layer["tokens"] is None for layer in stored["layers"])
    assert stored["config"]["preset"] is None
    assert stored["config"]["importance"] == "unknown"
    assert stored["config"]["min_degree"] == 0
    assert "mean relative error" not in repr(report)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_packed_one_by_one_or_left_as_they_are(name, tmp_path):
    model = sparse_model(name, lambda layer: "2:4")
    before = weights_of(model)
    pruner = EGGSPruner(model)
    report = pruner.pack()
    assert any(".experts." in layer.name for layer in report.layers)
    pruner.save_pretrained(tmp_path / "packed")
    assert inspect_checkpoint(tmp_path / "packed").ok
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert same_values(weights_of(loaded.dequantize()), before)

    model = sparse_model(name, lambda layer: "2:4" if "self_attn" in layer else None)
    before = weights_of(model)
    report = EGGSPruner(model).pack()
    assert not has_split_experts(model)
    assert "model.layers.0.mlp.experts" in {layer.name for layer in report.left_dense}
    assert same_values(weights_of(model.dequantize()), before)


def not_a_number(model):
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"pattern": "1:4"}, ModelError, "no layer of the 14 looked at is 1:4; name another pattern, or prune"),
        (not_a_number, {}, NumericalError, "layers.1.mlp.down_proj: the weight holds NaN"),
        (None, {"targets": ["nothing"]}, ConfigError, "matches no linear layer"),
        (None, {"pattern": "4:2"}, ConfigError, "n=4 is the number kept"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, options, error, message):
    model = sparse_model("llama", lambda _: "2:4")
    if change:
        change(model)
    before = weights_of(model)
    with pytest.raises(error, match=message):
        EGGSPruner(model).pack(**options)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_zeros_is_refused_whole():
    for name in ("llama", "mixtral"):
        model = tiny.make_model(name)
        before = weights_of(model)
        with pytest.raises(
            ModelError, match=r"no layer of the .* looked at is one of 1:8, 2:16, 1:4, .*prune the model"
        ):
            EGGSPruner(model).pack()
        assert same_values(weights_of(model), before)


def test_a_packed_model_is_not_packed_again():
    pruner = EGGSPruner(sparse_model("llama", lambda _: "2:4"))
    pruner.pack()
    with pytest.raises(ModelError, match="is packed already"):
        pruner.pack()
