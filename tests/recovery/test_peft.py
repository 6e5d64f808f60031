"""What PEFT has besides LoRA, and adapters that change models: on packed layers, and beside them."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.errors import ConfigError
from optimum_eggs.nn import packed_layers

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

IDS = tiny.make_windows(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    """A folder of a packed model with a head of its own."""
    pruner = EGGSPruner(tiny.make_model("llama-untied"), tokenizer)
    config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=16)
    pruner.prune(config, calibration=tiny.make_windows(2, 16))
    folder = tmp_path_factory.mktemp("packed") / "untied"
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tokenizer):
    """Packed but for the second matrix of each expert, in experts that are split for it."""
    pruner = EGGSPruner(tiny.make_model("qwen3_moe"), tokenizer)
    config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=16, ignore=["down_proj", "o_proj", "lm_head"])
    pruner.prune(config, calibration=tiny.make_windows(2, 16))
    return pruner.model


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LNTuningConfig", {}),
        ("TrainableTokensConfig", {"token_indices": [5, 6]}),
        ("LoHaConfig", {"target_modules": ["lm_head"]}),
        ("LoKrConfig", {"target_modules": r"lm_head"}),
        ("IA3Config", {"target_modules": ["lm_head"], "feedforward_modules": []}),
        ("VeraConfig", {"target_modules": ["lm_head"]}),
        ("PromptTuningConfig", {"num_virtual_tokens": 2}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    ],
)
def test_what_touches_no_packed_layer_is_let_through(kind, options, untied, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(untied)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    assert not any(layer.weight.requires_grad for layer in packed_layers(model).values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("LoHaConfig", {"target_modules": ["lm_head", "up_proj"]}, "model.layers.0.mlp.up_proj"),
        ("LoHaConfig", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.1.self_attn.q_proj"),
        ("LoKrConfig", {"target_modules": r".*\.v_proj"}, "model.layers.0.self_attn.v_proj"),
        ("LoHaConfig", {"target_modules": "all-linear"}, "model.layers.0.self_attn.q_proj"),
        ("IA3Config", {}, "model.layers.0.self_attn.k_proj"),  # by PEFT's table of architectures
        ("XLoraConfig", {"hidden_size": 32, "adapters": {"one": "folder"}}, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_the_layer_is_named_and_nothing_is_changed(kind, options, name, untied):
    model = AutoModelForCausalLM.from_pretrained(untied)
    before, asked = logits(model), options.get("target_modules")
    config = getattr(peft, kind)(**options)
    with pytest.raises(ConfigError, match=rf"put on {name}, which is packed; use a LoraConfig"):
        peft.get_peft_model(model, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)
    assert getattr(config, "target_modules", None) == (set(asked) if isinstance(asked, list) else asked)


def test_dense_experts_beside_packed_ones_are_refused_and_other_dense_layers_are_not(mixture):
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj, an expert beside packed ones"):
        peft.get_peft_model(mixture, peft.LoHaConfig(target_modules=["down_proj"]))
    model = peft.get_peft_model(mixture, peft.LoHaConfig(target_modules=["o_proj"]))
    assert torch.isfinite(logits(model)).all()
    model.unload()


def test_an_adapter_that_names_its_layers_by_its_tensors(untied):
    model = AutoModelForCausalLM.from_pretrained(untied)
    names = [f"model.layers.0.self_attn.q_proj.hada_w{side}_{half}" for side in "12" for half in "ab"]
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj"):
        peft.inject_adapter_in_model(peft.LoHaConfig(), model, state_dict=dict.fromkeys(names))
    names = [f"lm_head.hada_w{side}_{half}" for side in "12" for half in "ab"]
    peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["lm_head"]), model, state_dict=dict.fromkeys(names))
    assert isinstance(model.lm_head, BaseTunerLayer)


def adapter(base, folder, **options):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    model.save_pretrained(folder)
    return model


def said(word, function):
    """What a call returns, and its warnings that have a word in them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = function()
    return made, [str(each.message) for each in found if word in str(each.message)]


def test_a_masked_adapter_on_a_dense_model_warns_once(packed_folder, tmp_path):
    model = adapter(AutoModelForCausalLM.from_pretrained(packed_folder), tmp_path / "masked")
    assert json.loads((tmp_path / "masked" / "adapter_config.json").read_text())["optimum_eggs_masked"] is True
    expected = logits(model)

    packed = AutoModelForCausalLM.from_pretrained(packed_folder)
    again, messages = said("packed", lambda: peft.PeftModel.from_pretrained(packed, tmp_path / "masked"))
    assert not messages
    assert torch.equal(logits(again), expected)

    dense = AutoModelForCausalLM.from_pretrained(packed_folder).dequantize()
    plain, messages = said("packed", lambda: peft.PeftModel.from_pretrained(dense, tmp_path / "masked"))
    assert len(messages) == 1
    assert "'default' was made on packed layers" in messages[0]
    assert "merge it on the packed model first (merge_and_unload())" in messages[0]
    assert not torch.allclose(logits(plain), expected, atol=1e-3)

    for name, each in (("packed", again), ("dense", plain)):  # what it was made on is kept
        each.save_pretrained(tmp_path / name)
        assert "optimum_eggs_masked" in (tmp_path / name / "adapter_config.json").read_text()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_plain_adapter_says_nothing(packed_folder, dense_folder, untied, tmp_path):
    adapter(AutoModelForCausalLM.from_pretrained(dense_folder), tmp_path / "plain")
    assert "optimum_eggs" not in (tmp_path / "plain" / "adapter_config.json").read_text()
    for folder in (packed_folder, dense_folder):
        base = AutoModelForCausalLM.from_pretrained(folder)
        _, messages = said("packed", lambda base=base: peft.PeftModel.from_pretrained(base, tmp_path / "plain"))
        assert not messages
    beside = AutoModelForCausalLM.from_pretrained(untied)
    adapter(beside, tmp_path / "head", target_modules=["lm_head"])
    assert "optimum_eggs" not in (tmp_path / "head" / "adapter_config.json").read_text()


def test_a_second_adapter_is_marked_too(packed_folder, tmp_path):
    model = adapter(AutoModelForCausalLM.from_pretrained(packed_folder), tmp_path / "first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "both")
    assert "optimum_eggs_masked" in (tmp_path / "both" / "second" / "adapter_config.json").read_text()


def test_the_configuration_of_a_masked_adapter_is_made_again_from_its_dictionary(packed_folder, tmp_path):
    model = adapter(AutoModelForCausalLM.from_pretrained(packed_folder), tmp_path)
    fields = model.peft_config["default"].to_dict()
    assert peft.LoraConfig(**fields).to_dict() == peft.get_peft_config(fields).to_dict() == fields


def test_peft_alone_reads_what_a_masked_adapter_says_of_itself(packed_folder, tmp_path):
    adapter(AutoModelForCausalLM.from_pretrained(packed_folder), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    alone = peft.config.PeftConfigMixin.from_peft_type.__func__.__wrapped__  # before this package wrapped it
    config, messages = said("optimum_eggs", lambda: alone(peft.LoraConfig, **fields))
    assert config.r == 2
    assert len(messages) == 1
    assert "['optimum_eggs_masked']" in messages[0]
