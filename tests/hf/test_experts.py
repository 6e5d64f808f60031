"""Mixtures of experts: saved, loaded, generating, recovered, made dense."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.evaluation import Perplexity
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers
from optimum_eggs.streaming import prune_checkpoint

IDS = tiny.make_windows(2, 12)
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
SIZE = {"num_samples": 8, "seq_len": 16, "band": 8}


@pytest.fixture
def save(tmp_path, tokenizer):
    """Prunes a tiny mixture and saves it."""

    def made(name, **values):
        pruner = EGGSPruner(tiny.make_model(name), tokenizer)
        pruner.prune(EGGSConfig("2:4", **SIZE | values), calibration=tiny.make_windows(8, 16))
        pruner.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_loads_generates_and_is_certified_expert_by_expert(name, save):
    folder = save(name)
    found = inspect_checkpoint(folder)
    assert found.ok
    experts = [layer for layer in found.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 2
    assert all(layer.certificate.floors[8] >= 1 and layer.certificate.starved_inputs == 0 for layer in experts)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(packed_layers(model)) == len(found.layers)
    ids = model.generate(IDS[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert ids.shape == (1, 20)
    again = model.generate(IDS[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(ids, again)


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_experts_take_nine_sixteenths(name, save):
    folder = save(name)
    with safe_open(folder / "model.safetensors", "pt") as opened:
        sizes = {key: opened.get_tensor(key).nbytes for key in opened.keys() if ".experts." in key}  # noqa: SIM118
    packed = sum(size for key, size in sizes.items() if not key.endswith("bias"))
    dense = sum(
        p.nbytes for key, p in tiny.make_model(name).named_parameters() if key.endswith("proj") and "exp" in key
    )
    assert packed == dense * 17 // 32  # float32: half of the values, and a bit for each


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_some_blocks_only(name, save, tmp_path):
    folder = save(name, targets=["layers.1"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(".layers.1." in layer for layer in packed_layers(model))
    assert len(packed_layers(model)) == 4 + 8
    dense = tiny.make_model(name).model.layers[0].mlp.experts.down_proj[2]
    kept = model.model.layers[0].mlp.experts.get_submodule("2.down_proj").weight
    assert torch.equal(kept, dense.T if name == "gpt_oss" else dense)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_a_mixture_in_shards_and_without_its_head(save, tmp_path):
    folder = save("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits(model))
    base = AutoModel.from_pretrained(folder)
    assert len(packed_layers(base)) == len(packed_layers(model))
    with torch.no_grad():
        assert torch.equal(base(input_ids=IDS)[0], model.model(input_ids=IDS)[0])


@pytest.mark.parametrize("name", MIXTURES)
def test_made_dense_it_is_a_model_of_its_architecture(name, save, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(name))
    expected = logits(model)
    model.dequantize()
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    original = tiny.make_model(name)
    original.save_pretrained(tmp_path / "original")
    kept, asked = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("dense", "original"))
    assert kept == asked
    with (
        safe_open(tmp_path / "dense" / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "original" / "model.safetensors", "pt") as other,
    ):
        assert set(one.keys()) == set(other.keys())


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "values",
    [
        {"targets": ["layers.1"]},
        pytest.param({"ignore": ["experts", "lm_head"]}, marks=pytest.mark.slow),
        pytest.param({"preset": "best"}, marks=pytest.mark.slow),
    ],
)
def test_from_disk_a_mixture_gives_the_same_files(name, values, tmp_path, tokenizer, text_file):
    values = SIZE | ({"block_tuning": 2, "batch_size": 2} if "preset" in values else {}) | values
    config = EGGSConfig("2:4", calibration=str(text_file), **values)
    tiny.make_model(name).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    pruner = EGGSPruner.from_pretrained(tmp_path / "dense")
    pruner.model.set_experts_implementation("eager")
    pruner.prune(config)
    pruner.save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config, progress=False)
    with (
        safe_open(tmp_path / "memory" / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "disk" / "model.safetensors", "pt") as other,
    ):
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())  # noqa: SIM118


def test_pruned_on_load(tmp_path, tokenizer, text_file):
    tiny.make_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = EGGSConfig("2:4", calibration=str(text_file), **SIZE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(loaded)) == 24
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_lora_on_experts_merges_without_losing_a_zero(name, save, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(save(name))
    masks = {key: layer.mask() for key, layer in packed_layers(model).items()}
    config = peft.LoraConfig(r=2, target_modules=["gate_up_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.1)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    layers = packed_layers(merged)
    assert layers.keys() == masks.keys()
    assert all(torch.equal(layer.mask(), masks[key]) for key, layer in layers.items())
    assert all(isinstance(layer, NMLinear) for layer in layers.values())
    merged.save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    fresh.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(fresh), expected)


@pytest.mark.parametrize("method", ["lora", "values"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_is_recovered(name, method, save, tmp_path, text_file, monkeypatch):
    pytest.importorskip("peft")
    from optimum_eggs.recovery.recover import RecoverySettings, recover

    # A random model learns little from a random text: what was trained is kept, whether it is better or not.
    judged = Perplexity(2.0, 0.7, 1, 1, 1)
    monkeypatch.setattr(sys.modules["optimum_eggs.recovery.recover"], "perplexity", lambda *arguments: judged)
    folder = save(name)
    settings = RecoverySettings(
        [str(text_file)], method=method, seq_len=16, batch_size=2, steps=4, evaluations=2, rank=2, learning_rate=1e-1
    )
    recover(folder, tmp_path / "recovered", settings)
    found = inspect_checkpoint(tmp_path / "recovered")
    assert found.ok
    before, after = (packed_layers(AutoModelForCausalLM.from_pretrained(f)) for f in (folder, tmp_path / "recovered"))
    assert all(torch.equal(layer.mask(), after[key].mask()) for key, layer in before.items())
    moved = {key for key, layer in before.items() if not torch.equal(layer.weight, after[key].weight)}
    assert any(".experts." in key for key in moved)
