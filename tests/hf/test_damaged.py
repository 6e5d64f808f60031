"""What `from_pretrained` does with a damaged packed checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig
from optimum_eggs.engine import prune_model
from optimum_eggs.errors import CheckpointError, ConfigError, ModelError
from optimum_eggs.hf.attach import attach_quantizer
from optimum_eggs.hf.loading import load_model, load_tokenizer, translated
from optimum_eggs.nn import packed_layers

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(packed_folder, tmp_path):
    return shutil.copytree(packed_folder, tmp_path / "copy")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def shorten_meta(tensors):
    tensors[f"{LAYER}.weight_meta"] = tensors[f"{LAYER}.weight_meta"][:, :-1].contiguous()


def keep_one_more(tensors):
    tensors[f"{LAYER}.weight_meta"][3, 0] |= 0xF


def drop_meta(tensors):
    del tensors[f"{LAYER}.weight_meta"]


def lose_rows(tensors):
    for part in ("weight", "weight_meta"):
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:-8].contiguous()


def spoil_value(tensors):
    tensors[f"{LAYER}.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"model.safetensors: is truncated or no safetensors file"),
        (lambda f: change_tensors(f, shorten_meta), rf"{LAYER}: weight_meta has shape \(64, 3\); with weight"),
        (lambda f: change_tensors(f, keep_one_more), rf"{LAYER}: weight_meta keeps 4 of 4 in row 3, group 0"),
        (lambda f: change_tensors(f, drop_meta), rf"{LAYER}: config.json lists it as pruned, and its weight_meta is"),
        (lambda f: change_tensors(f, lose_rows), rf"{LAYER}: weight has shape \(56, 16\); in the LlamaForCausalLM of"),
        (lambda f: change_tensors(f, spoil_value), rf"{LAYER}: weight holds NaN or infinite values"),
        (lambda f: change_config(f, lambda c: c.update(pruned_modules={})), "pruned_modules is missing or empty"),
        (lambda f: change_config(f, lambda c: c["pruned_modules"].update({LAYER: "1:4"})), rf"{LAYER}: .* it must be"),
        (
            lambda f: change_config(f, lambda c: c["pruned_modules"].update(x="2:4")),
            "x: config.json lists it as pruned",
        ),
    ],
    ids=[
        "truncated",
        "meta length",
        "meta popcount",
        "meta missing",
        "rows missing",
        "nan",
        "no list",
        "other pattern",
        "other layer",
    ],
)
def test_damage_is_named(folder, change, message):
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    ("put", "what"),
    [(Path.mkdir, "is a folder, where a file must be"), (partial(Path.symlink_to, target="gone"), "is a link to gone")],
)
def test_what_is_in_the_place_of_a_file_is_called_what_it_is(name, put, what, dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "copy")
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(ModelError, match=f"^{folder / name}: {what}"):
        (load_tokenizer if name == "tokenizer.json" else load_model)(folder)


def test_a_weight_file_that_is_not_needed_may_be_away(dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "copy")
    (folder / "consolidated.safetensors").symlink_to("gone")  # as in a cache that was cleared in part
    load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 99},
            r"format_version=99 is unknown to this release, which reads versions up to 2",
        ),
        ({"m": 5}, r"pattern 2:5: m=5 is not a supported group size"),
        ({"surprise": 1}, r"surprise=1: EGGSConfig has no such key"),
    ],
)
def test_a_configuration_that_is_not_ours_is_named(folder, change, message):
    change_config(folder, lambda config: config.update(change))
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_that_calls_itself_packed_and_is_dense_is_named(packed_folder, folder):
    dense = AutoModelForCausalLM.from_pretrained(packed_folder).dequantize()
    save_file(
        {name: value for name, value in dense.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"says that 14 layers are packed, and the files hold no packed layer"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_bias_that_is_missing_or_too_short_is_named(tmp_path):
    model = make_model("opt")
    prune_model(model, EGGSConfig("2:4", preset="magnitude"), torch.zeros(1, 8, dtype=torch.int64))
    attach_quantizer(model, EGGSConfig("2:4", preset="magnitude"))
    name = "model.decoder.layers.0.fc1"
    patterns = {key: str(layer.pattern) for key, layer in packed_layers(model).items()}
    model.config.quantization_config.pruned_modules = patterns
    for change, message in (
        (lambda tensors: tensors.pop(f"{name}.bias"), f"{name}: its bias is missing"),
        (
            lambda tensors: tensors.update({f"{name}.bias": tensors[f"{name}.bias"][:-1].contiguous()}),
            rf"{name}: bias has shape \(63,\); with weight \(64, 16\) it must be \(64,\)",
        ),
    ):
        model.save_pretrained(tmp_path)
        change_tensors(tmp_path, change)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_kind_whose_index_names_no_weights_is_damaged(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    names = load_file(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "config.json")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    change_config(folder, lambda config: config.update(quant_method=0.5))  # so that this package is not asked
    with pytest.raises(CheckpointError, match="a weight file is damaged"):
        load_model(folder)


class Anything:
    """What is no tensor."""


@pytest.mark.parametrize("kind", ["class", "function"])
def test_a_pickle_of_more_than_tensors_is_not_called_damaged(kind, dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    held = {"lm_head.weight": torch.zeros(2), "other": Anything() if kind == "class" else os.system}
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a weight file holds more than tensors, which could run code") as caught:
        load_model(folder)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"garbage here"])
def test_a_damaged_pickle_is_called_damaged(data, dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match="a weight file is damaged"):
        load_model(folder)


def test_memory_that_runs_out_while_loading_is_no_fault_of_the_model():
    with pytest.raises(RuntimeError, match="can't allocate memory"), translated("me/model", "model"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def test_docstrings_that_transformers_misses_are_named(monkeypatch):
    flags = SimpleNamespace(optimize=2)
    monkeypatch.setattr("optimum_eggs.hf.loading.sys", SimpleNamespace(flags=flags))
    error = ValueError("No `Args` or `Parameters` section is found in the docstring of `BaseModelOutput`.")
    with pytest.raises(ModelError, match="start it without -OO, or PYTHONOPTIMIZE=2"), translated("me/model", "model"):
        raise error
