"""Adapters on layers of integers, and recovery from and to them."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.cli.main import main
from optimum_eggs.engine.report import read_report
from optimum_eggs.errors import ConfigError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import CodedLinear, RoundedLinear, packed_layers
from optimum_eggs.quantize import quantize
from optimum_eggs.recovery.recover import RecoverySettings, recover

peft = pytest.importorskip("peft")
IDS = tiny.make_windows(4, 12)
SMALL = {"seq_len": 16, "batch_size": 2, "steps": 6, "evaluations": 2, "rank": 4}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["int8", "int4"])
def folder(request, tmp_path_factory, tokenizer):
    """A packed model of integers, head included."""
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    config = EGGSConfig("2:4", values=request.param, value_group=64, head="int8", num_samples=4, seq_len=16)
    pruner.prune(config, calibration=tiny.make_windows(4, 16))
    out = tmp_path_factory.mktemp("integers") / request.param
    pruner.save_pretrained(out)
    return out


def trained(model, steps=4):
    """The model under a plain LoRA that has been trained a little."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return wrapped


def test_a_plain_lora_is_trained_and_merged_and_keeps_every_zero(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    masks = {name: layer.mask() for name, layer in packed_layers(model).items()}
    before = logits(model)
    wrapped = trained(model)
    adapted = logits(wrapped)
    assert not torch.equal(adapted, before)
    with pytest.warns(UserWarning, match="merging into layers of integers rounds the sum"):
        merged = wrapped.merge_and_unload(safe_merge=True)
    layers = packed_layers(merged)
    assert all(torch.equal(layers[name].mask(), mask) for name, mask in masks.items())
    errors = [layer.merge_error for layer in layers.values()]
    limit = 0.01 if layers[next(iter(layers))].coding.bits == 8 else 0.15
    assert all(0 < error < limit for error in errors)
    distance = float((logits(merged) - adapted).norm() / adapted.norm())
    assert distance < 4 * max(errors)
    merged.save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.filterwarnings("ignore:merging into layers")
def test_a_merge_is_undone_to_the_bit(folder):
    wrapped = trained(AutoModelForCausalLM.from_pretrained(folder))
    adapted = logits(wrapped)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert {layer.merge_error for layer in packed_layers(wrapped).values()} == {None}
    now = wrapped.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert torch.equal(logits(wrapped), adapted)


def test_an_adapter_comes_back_on_integers(folder, tmp_path):
    wrapped = trained(AutoModelForCausalLM.from_pretrained(folder))
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_adapters_that_fill_zeros_are_refused(folder):
    with pytest.raises(ConfigError, match="do not keep the zeros of packed layers"):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoHaConfig(target_modules="all-linear"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_nothing_is_put_on_a_head_of_integers(options, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        ConfigError, match=r"LORA would be put on .*, which holds integers, is not packed and is not trained"
    ):
        peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("safe", [True, False])
def test_a_broken_adapter_is_not_merged(safe, folder):
    wrapped = trained(AutoModelForCausalLM.from_pretrained(folder))
    layer = wrapped.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = layer.base_layer.weight.data, layer.base_layer.weight_scale
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=safe)
    assert layer.base_layer.weight.data.data_ptr() == before[0].data_ptr()
    assert layer.base_layer.weight_scale is before[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "values"])
def test_recovery_begins_and_ends_with_integers(method, folder, text_file, dense_folder, tmp_path):
    settings = RecoverySettings([str(text_file)], teacher=str(dense_folder), method=method, **SMALL)
    report = recover(folder, tmp_path / "out", settings)
    found = inspect_checkpoint(tmp_path / "out", progress=False)
    assert found.ok
    first = inspect_checkpoint(folder, progress=False)
    assert found.config["coded_modules"] == first.config["coded_modules"]
    assert [layer.certificate for layer in found.layers] == [layer.certificate for layer in first.layers]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = packed_layers(model).values()
    assert all(isinstance(layer, CodedLinear) and not isinstance(layer, RoundedLinear) for layer in layers)
    assert report.perplexity_after < report.perplexity_before * 1.001
    assert read_report(tmp_path / "out")["recovery"]["perplexity_after"] == report.perplexity_after


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantize_from_the_command_line(packed_folder, text_file, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    common = ["--calibration", str(text_file), "--num-samples", "4", "--seq-len", "16", "--device", "cpu"]
    arguments = ["quantize", str(packed_folder), str(out), "--values", "int4", "--head", "int8"]
    common += ["--rounding-tuning", "3"]
    assert main([*arguments, *common]) == 0
    assert "modules in integers: values int4 (gptq, 128 inputs a scale), head int8" in capsys.readouterr().out
    report = read_report(out)
    assert report["quantization"]["calibration"]["source"] == text_file.name
    assert {layer["coding"] for layer in report["layers"]} == {"int4:128"}
    assert report["config"]["calibration"] == read_report(packed_folder)["config"]["calibration"]
    assert "as `int4` with a scale for every 128 inputs" in (out / "README.md").read_text()
    assert "optimum-cli eggs quantize out rounded --values int4" in (out / "README.md").read_text()
    assert inspect_checkpoint(out, progress=False).ok

    assert main(["quantize", str(packed_folder), str(tmp_path / "plain"), "--values", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounding"] == "nearest"
    unused = ["--values", "int8", "--calibration", str(text_file), "--overwrite"]
    assert main(["quantize", str(packed_folder), str(tmp_path / "plain"), *unused]) == 0
    capsys.readouterr()
    assert "is not read: values are rounded to the nearest, and no block is tuned" in caplog.text
    assert read_report(tmp_path / "plain")["quantization"]["calibration"] is None
    for wrong, message in (
        ([str(packed_folder), "--values", "int4"], "calibration is missing"),
        (
            [str(packed_folder)],
            "values=None (--values), head=None and ignored=None: nothing is to be stored in integers",
        ),
        ([str(out), "--values", "int8"], "holds integers already"),
    ):
        model, *flags = wrong
        assert main(["quantize", model, str(tmp_path / "wrong"), *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_short_windows_follow_from_the_tuning_of_the_rounding(tokenizer, text_file, tmp_path):
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    short = {"num_samples": 4, "seq_len": 16}
    config = EGGSConfig("2:4", preset="best", block_tuning=2, short_share=0, **short)
    pruner.prune(config, calibration=tiny.make_windows(4, 16))
    pruner.save_pretrained(tmp_path / "packed")
    settings = {"values": "int4", "calibration": str(text_file), "rounding_tuning": 3} | short
    tuning = {
        name: quantize(tmp_path / "packed", tmp_path / name, settings | share, device="cpu")["tuning"]
        for name, share in (("default", {}), ("eighth", {"short_share": 0.125}), ("none", {"short_share": 0}))
    }
    assert tuning["default"] == tuning["eighth"] != tuning["none"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_left_dense_become_integers_from_the_command_line(dense_folder, text_file, tmp_path, capsys):
    sizes = ["--num-samples", "4", "--seq-len", "16", "--ignore", "lm_head", "v_proj"]
    prune = ["prune", str(dense_folder), str(tmp_path / "out"), "--calibration", str(text_file), *sizes]
    assert main(prune) == 0
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "later"), "--ignored", "int8"]) == 0
    assert "2 modules in integers: values floats, ignored int8" in capsys.readouterr().out
    prune[2] = str(tmp_path / "at-once")
    assert main([*prune, "--ignored", "int8"]) == 0
    coded = {f"model.layers.{block}.self_attn.v_proj": "int8:128" for block in range(2)}
    for folder in ("later", "at-once"):
        found = inspect_checkpoint(tmp_path / folder, progress=False)
        assert found.ok
        assert found.config["coded_modules"] == coded
    later, at_once = (load_file(tmp_path / folder / "model.safetensors") for folder in ("later", "at-once"))
    assert later.keys() == at_once.keys()
    assert all(torch.equal(value, at_once[key]) for key, value in later.items())
    prune[2] = str(tmp_path / "none")
    assert main([part for part in prune if part != "v_proj"] + ["--ignored", "int8"]) == 2
    assert "leave no linear layer of the blocks dense" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_prune_takes_integers_from_the_command_line(dense_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["prune", str(dense_folder), str(out), "--calibration", str(text_file), "--num-samples", "4"]
    assert main([*arguments, "--seq-len", "16", "--values", "int8", "--value-group", "64", "--head", "int8"]) == 0
    capsys.readouterr()
    found = inspect_checkpoint(out, progress=False)
    assert set(found.config["coded_modules"].values()) == {"int8:64"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["evaluate", str(out), "--text", str(text_file), "--seq-len", "16", "--num-windows", "4"]) == 0
