"""`evaluate` from Python: folders and models in memory, one and two."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.errors import CalibrationError, CheckpointError, ConfigError, ModelError
from optimum_eggs.evaluation import EvaluationResult, compare, evaluate, perplexity, read, record
from optimum_eggs.evaluation.windows import evaluation_windows
from optimum_eggs.hf.attach import packed_layers

SIZE = {"seq_len": 16, "num_windows": 3}


def test_a_folder_is_measured_as_its_parts_are(packed_folder, dense_folder, text_file, tokenizer):
    found = evaluate(packed_folder, dense_folder, text=text_file, **SIZE)
    assert isinstance(found, EvaluationResult)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (packed_folder, dense_folder)]
    windows = evaluation_windows(text_file, tokenizer, 16, 3)
    for each, model in zip((found.model, found.against), models, strict=True):
        assert each.perplexity.perplexity == perplexity(model, windows).perplexity
    assert found.comparison == compare(read(models, windows))
    assert (found.model.pruned, found.against.pruned) == (True, False)
    assert (found.model.folder, found.conditions.text) == (str(packed_folder), text_file.name)
    assert found.to_dict()["ratio"]["pruned_layer_bytes"] == 1 / 2 + 1 / 32  # float32


def test_models_in_memory_are_measured_as_folders_are_and_left_as_they_were(
    packed_folder, dense_folder, text_file, tokenizer
):
    models = [AutoModelForCausalLM.from_pretrained(folder).train() for folder in (packed_folder, dense_folder)]
    found = evaluate(*models, text=[text_file.read_text()], tokenizer=tokenizer, **SIZE)
    assert all(model.training for model in models)
    expected = evaluate(packed_folder, dense_folder, text=text_file, **SIZE)
    for ours, theirs in ((found.model, expected.model), (found.against, expected.against)):
        assert dataclasses.replace(theirs, folder=None, size=ours.size) == ours
        assert dataclasses.replace(theirs.size, weight_bytes=None) == ours.size
    assert found.comparison == expected.comparison
    assert found.conditions.text == "list in memory"
    assert "weight_bytes" not in found.to_dict()["ratio"]
    assert not record(found)  # nowhere to


def test_a_model_in_memory_can_be_recorded_where_it_was_saved(packed_folder, text_file, tokenizer, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"evaluations": []}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = evaluate(model, text=text_file, tokenizer=tokenizer, stride=8, **SIZE)
    assert record(found, folder)
    (entry,) = json.loads((folder / "report.json").read_text())["evaluations"]
    assert entry["metrics"]["perplexity"] == found.model.perplexity.perplexity
    assert entry["conditions"] == "3 windows of 16 tokens with stride 8, float32"
    assert entry["dataset"] == text_file.name


def test_experts_are_counted_in_the_dense_model_too(tokenizer, text_file, tmp_path):
    model = tiny.make_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    pruner = EGGSPruner(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tokenizer)
    pruner.prune(EGGSConfig("2:4", num_samples=8, seq_len=16, band=8), calibration=text_file, progress=False)
    pruner.save_pretrained(tmp_path / "out")
    found = evaluate(tmp_path / "out", tmp_path / "dense", text=text_file, **SIZE)
    assert found.to_dict()["ratio"]["pruned_layer_bytes"] == pytest.approx(1 / 2 + 1 / 32, rel=0.02)  # padded bits
    in_memory = evaluate(pruner.model, model, text=text_file, tokenizer=tokenizer, **SIZE)
    assert in_memory.against.size.pruned_layer_bytes == found.against.size.pruned_layer_bytes


def test_what_was_measured_on_another_text_stays(packed_folder, tokenizer, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"evaluations": []}))
    for text in ("the first of the texts " * 30, "and now another one " * 30, "the first of the texts " * 30):
        assert record(evaluate(folder, text=[text], **SIZE))
    first, second = json.loads((folder / "report.json").read_text())["evaluations"]
    assert first["dataset"] == second["dataset"] == "list in memory"
    assert first["tokens_sha256"] != second["tokens_sha256"]


def test_every_module_has_its_mode_back(packed_folder, text_file, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(packed_folder).train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, text=text_file, tokenizer=tokenizer, **SIZE)
    assert [module.training for module in model.modules()] == modes


def test_packed_layers_in_memory_take_what_their_tensors_take(packed_folder, text_file, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    found = evaluate(model, text=text_file, tokenizer=tokenizer, **SIZE)
    layers = packed_layers(model)
    assert found.model.pruned_layers == list(layers)
    assert found.model.size.pruned_layer_bytes == sum(x.weight.nbytes + x.weight_meta.nbytes for x in layers.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": None}, ConfigError, "nothing to judge on; give text"),
        ({"model": "some/id"}, ModelError, "some/id: there is no such folder; save the model first"),
        ({"model": tiny.make_model("llama")}, ConfigError, "a LlamaForCausalLM in memory: pass the model's tokenizer"),
        ({"text": "missing.txt"}, CalibrationError, "text='missing.txt': there is no such file"),
        ({"seq_len": 500}, CalibrationError, "seq_len=500 is more than the model's context of 128"),
        ({"stride": 17}, ConfigError, "stride=17 must be between 1 and seq_len=16"),
        ({"tasks": ["nothing-like-it"]}, ConfigError, "task 'nothing-like-it' is unknown"),
    ],
)
def test_bad_input_is_refused(change, error, message, packed_folder, text_file, monkeypatch):
    if "tasks" in change:
        harness = pytest.importorskip("lm_eval.tasks")
        # Reading which tasks the harness has takes ten seconds.
        monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    given = {"model": packed_folder, "text": text_file, **SIZE} | change
    with pytest.raises(error, match=message):
        evaluate(given.pop("model"), **given)


def test_a_damaged_file_is_found_before_anything_is_loaded(packed_folder, text_file, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        evaluate(folder, text=text_file)


def test_another_tokenizer_cannot_be_compared(packed_folder, dense_folder, text_file):
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(dense_folder)

    class Backwards:
        def __call__(self, text, **options):
            return {"input_ids": list(range(4, 200))}

    with pytest.raises(ModelError, match="LlamaForCausalLM: its tokenizer cuts the text differently"):
        evaluate(packed_folder, other, text=text_file, tokenizer=Backwards(), **SIZE)
