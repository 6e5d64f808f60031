"""`model.dequantize()`: one dtype, in whatever order it is cast; offloaded models; models with adapters."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.errors import ConfigError, ModelError
from optimum_eggs.nn import packed_layers
from optimum_eggs.nn.dense import DenseLinear

IDS = tiny.make_windows(2, 12)
CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Packed folders by architecture."""
    made = {}
    for name in ("llama", "gpt2", "qwen3_moe", "gpt_oss"):
        pruner = EGGSPruner(tiny.make_model(name), tokenizer)
        config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=16)
        pruner.prune(config, calibration=tiny.make_windows(2, 16))
        made[name] = tmp_path_factory.mktemp("packed") / name
        pruner.save_pretrained(made[name])
    return made


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def offloaded(folder, tmp_path, **options):
    """With its second block on the disk."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    base, blocks = model.base_model_prefix, "h" if hasattr(model, "transformer") else "layers"
    parts = {f"{base}.{name}" for name, _ in model.base_model.named_children() if name != blocks}
    places = dict.fromkeys({*parts, "lm_head", f"{base}.{blocks}.0"}, "cpu") | {f"{base}.{blocks}.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off", **options)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_casts_and_dequantize_come_in_any_order(name, start, folders):
    packed = AutoModelForCausalLM.from_pretrained(folders[name], dtype=start)
    dense = copy.deepcopy(packed).dequantize()
    assert dtypes(dense) == {start}
    assert "_is_quantized" in vars(packed.config)
    assert "_is_quantized" not in vars(dense.config)
    for cast in CASTS.values():
        first = cast(copy.deepcopy(packed))
        assert all(layer.weight_meta.dtype == torch.uint8 for layer in packed_layers(first).values())
        last = cast(copy.deepcopy(dense))
        first.dequantize()
        assert dtypes(first) == {last.dtype}
        assert same_weights(first, last)
    assert packed_layers(packed).popitem()[1].weight.dtype == start  # a copy casts itself


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_the_dtype_asked_for_is_that_of_all_parameters(name, folders, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(folders[name])
    expected = copy.deepcopy(packed).dequantize().to(torch.bfloat16)
    for dtype in (torch.bfloat16, "bfloat16"):
        model = copy.deepcopy(packed).dequantize(dtype=dtype)
        assert dtypes(model) == {torch.bfloat16}
        assert model.config.dtype is torch.bfloat16
        assert same_weights(model, expected)
    model.save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), expected)


def test_what_is_cast_apart_is_made_the_same(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="bfloat16")
    model.model.norm.float()
    model.model.layers[0].mlp.up_proj.float()
    assert dtypes(model.dequantize()) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float31", torch.int8], ids=str)
def test_a_dtype_that_is_none_leaves_the_model_as_it_was(dtype, folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ConfigError, match="dtype="):
        model.dequantize(dtype=dtype)
    assert len(packed_layers(model)) == 14
    assert model.is_quantized


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"offload_buffers": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_an_offloaded_model_is_made_dense_and_stays_offloaded(name, options, folders, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=options.get("dtype")).dequantize()
    whole.set_experts_implementation("eager")
    model = offloaded(folders[name], tmp_path, **options)
    assert any(layer.weight.is_meta for layer in packed_layers(model).values())
    model.dequantize()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not packed_layers(model)
    model.set_experts_implementation("eager")
    for _ in range(2):
        assert torch.equal(logits(model), logits(whole))
    model.save_pretrained(tmp_path / "dense")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), whole)


def test_an_offloaded_model_takes_the_dtype_asked_for(folders, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folders["llama"]).dequantize(dtype="bfloat16")
    model = offloaded(folders["llama"], tmp_path).dequantize(dtype="bfloat16")
    assert dtypes(model) == {torch.bfloat16}
    assert torch.equal(logits(model), logits(whole))
    whole = AutoModelForCausalLM.from_pretrained(folders["llama"]).dequantize().half()
    model = offloaded(folders["llama"], tmp_path).half().dequantize()
    assert torch.equal(logits(model), logits(whole))


def test_a_model_without_weights_is_not_made_dense(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"]).to("meta")
    with pytest.raises(ModelError, match="on the meta device"):
        model.dequantize()


def test_under_an_adapter_it_asks_to_merge_first(folders):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = logits(adapted)
    for each in (adapted, model):
        with pytest.raises(ModelError, match="merge it first with merge_and_unload"):
            each.dequantize()
    assert torch.equal(logits(adapted), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload().dequantize()), expected)


def test_an_adapter_beside_the_packed_layers_does_not_matter(folders):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False))
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, NMLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected)


def test_what_is_left_dense_is_read_fast_until_the_model_is_dense(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert type(model.lm_head) is DenseLinear
    assert type(model.dequantize().lm_head) is torch.nn.Linear
