from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, QuantoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.errors import CheckpointError, ConfigError, ModelError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers

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


@pytest.mark.slow
def test_without_this_package_loading_fails_loudly(packed_folder, python, tmp_path):
    import subprocess

    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(packed_folder)!r})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (EGGSConfig("1:4"), "asks for 1:4, and the model is packed at 2:4; leave quantization_config out"),
        (EGGSConfig("2:4", preset="best"), "asks for solver='admm', and the model was pruned with solver='sparsegpt'"),
        (EGGSConfig("2:4", seed=3), "asks for seed=3, and the model was pruned with seed=0"),
        (EGGSConfig("2:4", ignore=["mlp"]), r"asks for ignore=\['mlp'\], and the model was pruned with ignore="),
        (QuantoConfig("int8"), "is a QuantoConfig, and the model is packed at 2:4"),
    ],
    ids=["pattern", "method", "seed", "layers", "kind"],
)
def test_a_configuration_that_contradicts_a_packed_checkpoint_is_refused(packed_folder, given, message):
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(packed_folder, quantization_config=given)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM, AutoModel])
def test_a_configuration_of_none_is_none_given(kind, packed_folder, dense_folder):
    plain, model = (kind.from_pretrained(packed_folder, **given) for given in ({}, {"quantization_config": None}))
    assert model.config.quantization_config == plain.config.quantization_config
    assert packed_layers(model).keys() == packed_layers(plain).keys()
    assert packed_layers(model)
    assert not packed_layers(kind.from_pretrained(dense_folder, quantization_config=None))


def test_a_configuration_read_by_itself_has_that_of_the_packing_taken_out(packed_folder):
    config = AutoConfig.from_pretrained(packed_folder, quantization_config=None)
    assert config.quantization_config is None
    assert type(AutoModelForCausalLM.from_config(config).model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("given", ["default", "same", "stored"])
def test_a_configuration_that_agrees_with_a_packed_checkpoint_changes_nothing(packed_folder, text_file, given):
    stored = AutoModelForCausalLM.from_pretrained(packed_folder).config.quantization_config
    same = EGGSConfig("2:4", num_samples=8, seq_len=16, band=8, batch_size=3, calibration=str(text_file))
    configs = {"default": EGGSConfig("2:4"), "same": same, "stored": stored}
    model = AutoModelForCausalLM.from_pretrained(packed_folder, quantization_config=configs[given])
    assert model.config.quantization_config == stored


def test_configurations_are_merged_by_the_names_that_transformers_gives_them():
    stored = EGGSConfig("2:4")
    for given in (None, EGGSConfig("2:4")):
        names = {"quantization_config": stored, "quantization_config_from_args": given}
        assert AutoHfQuantizer.merge_quantization_configs(**names) == stored


def test_a_model_made_from_a_packed_configuration_is_saved_as_the_dense_one_it_is(packed_folder, tmp_path):
    config = AutoConfig.from_pretrained(packed_folder)
    for model in (AutoModelForCausalLM.from_config(config), LlamaForCausalLM(config)):
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert model.config.quantization_config["pruned_modules"]  # it can still be filled with a packed state dict
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("stored", [True, False], ids=["config of a folder", "config of a model"])
def test_a_packed_state_dict_is_loaded_without_a_folder(packed_folder, stored):
    whole = AutoModelForCausalLM.from_pretrained(packed_folder)
    config = AutoConfig.from_pretrained(packed_folder) if stored else whole.config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=whole.state_dict())
    assert torch.equal(logits(model), logits(whole))
    assert sum(isinstance(layer, NMLinear) for layer in model.modules()) == 14
    assert all(layer.weight.requires_grad for layer in model.modules() if isinstance(layer, NMLinear))


@pytest.mark.parametrize("part", ["weight", "weight_meta"])
def test_a_state_dict_that_lacks_a_part_of_a_packed_layer_is_refused(packed_folder, part):
    whole = AutoModelForCausalLM.from_pretrained(packed_folder)
    name = "model.layers.1.mlp.up_proj"
    state = whole.state_dict()
    del state[f"{name}.{part}"]
    with pytest.raises(CheckpointError, match=rf"{name}: .* its {part} is missing in the state dict"):
        LlamaForCausalLM.from_pretrained(None, config=whole.config, state_dict=state)


def test_a_state_dict_that_is_passed_is_what_is_saved(packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    changed["model.norm.weight"] += 1
    changed["model.layers.0.mlp.up_proj.weight"] *= 2
    model.save_pretrained(tmp_path, state_dict=changed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == changed.keys()
    assert all(torch.equal(value, changed[name]) for name, value in again.items())
    model.save_pretrained(tmp_path)  # once, and not from then on
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.items())


def test_what_wraps_modules_is_not_in_the_list_of_what_is_saved(packed_folder, tmp_path):
    # as FSDP does, whose state dict is gathered by the names without
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    state, listed = model.state_dict(), dict(model.config.quantization_config.pruned_modules)
    wrapped = torch.nn.Module()
    wrapped._fsdp_wrapped_module = model.model.layers[0]
    model.model.layers[0] = wrapped
    model.save_pretrained(tmp_path, state_dict=dict(state))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.pruned_modules == listed
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("change", ["a block taken out", "a layer made dense", "all layers made dense"])
def test_a_model_whose_layers_were_changed_by_hand_is_saved_as_it_is(change, packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    listed = dict(model.config.quantization_config.pruned_modules)
    if change == "a block taken out":
        del model.model.layers[1]
        model.config.num_hidden_layers = 1
        model.config.layer_types = None
    else:
        first = ["model.layers.0.mlp.up_proj"]
        for name in first if change == "a layer made dense" else list(listed):
            model.set_submodule(name, model.get_submodule(name).to_linear())
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.quantization_config.pruned_modules == listed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert packed_layers(again).keys() == packed_layers(model).keys()
    assert torch.equal(logits(again), expected)
    assert inspect_checkpoint(tmp_path / "saved").ok == bool(packed_layers(model))


def test_integers_are_not_saved_as_a_dense_model(tokenizer, tmp_path):
    model = pruned(
        "llama", tokenizer, EGGSConfig("2:4", preset="magnitude", head="int8", num_samples=8, seq_len=16)
    ).model
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    with pytest.raises(
        ModelError, match=r"embed_tokens holds integers, and no layer is packed any more.*dequantize\(\)"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not any((tmp_path / "saved").iterdir())
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
