from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.inspection import inspect_checkpoint

IDS = tiny.make_windows(2, 12)


def logits(model):
    model.set_experts_implementation("eager")  # adds in the order in which split experts do
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pruned(name, tokenizer, config, dtype=torch.float32):
    pruner = EGGSPruner(tiny.make_model(name, dtype=dtype), tokenizer)
    pruner.prune(config, calibration=tiny.make_windows(8, 16))
    return pruner


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_architecture_comes_back_bit_for_bit(name, dtype, tokenizer, config, tmp_path):
    pruner = pruned(name, tokenizer, config, dtype)
    expected = logits(pruner.model)
    kind = type(pruner.model)
    pruner.save_pretrained(tmp_path / "packed")
    assert inspect_checkpoint(tmp_path / "packed").ok
    model = kind.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(layer, NMLinear) for layer in model.modules()) == len(pruner.report.layers)
    assert torch.equal(logits(model), expected)

    # Saved again, it is the same; made dense, it loads without this package's layers, and gives the same.
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again")), expected)
    model.dequantize()
    assert not any(isinstance(layer, NMLinear) for layer in model.modules())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = kind.from_pretrained(tmp_path / "dense")
    assert type(dense) is kind
    assert torch.equal(logits(dense), expected)


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "auto"}])
def test_ways_to_load(name, options, tokenizer, config, tmp_path):
    pruner = pruned(name, tokenizer, config)
    pruner.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert torch.equal(logits(model), logits(pruner.model))


def test_a_dtype_override_casts_the_values(packed_folder):
    wide = AutoModelForCausalLM.from_pretrained(packed_folder)
    narrow = AutoModelForCausalLM.from_pretrained(packed_folder, dtype="bfloat16")
    layers = zip(wide.modules(), narrow.modules(), strict=True)
    pairs = [(a, b) for a, b in layers if isinstance(a, NMLinear)]
    assert all(torch.equal(a.weight.bfloat16(), b.weight) for a, b in pairs)
    assert all(torch.equal(a.weight_meta, b.weight_meta) for a, b in pairs)


def test_its_parameters_ask_for_gradients_as_those_of_a_dense_model_do(packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_base_model_loads_from_a_causal_checkpoint(packed_folder):
    base = AutoModel.from_pretrained(packed_folder)
    whole = AutoModelForCausalLM.from_pretrained(packed_folder)
    with torch.no_grad():
        assert torch.equal(base(input_ids=IDS).last_hidden_state, whole.model(input_ids=IDS).last_hidden_state)


def test_offloaded_to_disk_it_gives_the_same(packed_folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(packed_folder, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(packed_folder)))


def test_generation_with_a_cache(packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    dense = AutoModelForCausalLM.from_pretrained(packed_folder).dequantize()
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


def test_a_plain_save_of_a_loaded_model_keeps_the_list_of_layers(packed_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(packed_folder).save_pretrained(tmp_path / "copy")
    first, second = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (packed_folder, tmp_path / "copy")
    )
    assert first == second


def test_without_this_package_loading_fails_loudly(packed_folder, python, tmp_path):
    import subprocess

    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(packed_folder)!r})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


def test_a_configuration_given_for_a_packed_checkpoint_is_ignored_with_a_warning(packed_folder):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(packed_folder, quantization_config=EGGSConfig("1:4"))
    assert model.config.quantization_config.n == 2
