"""`evaluate` from Python: folders and models in memory, one and two."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import Windows
from optimum_eggs.cli.main import main
from optimum_eggs.engine.report import text_uses
from optimum_eggs.engine.run import calibration_windows
from optimum_eggs.errors import CalibrationError, CheckpointError, ConfigError, ModelError, NumericalError
from optimum_eggs.evaluation import EvaluationResult, compare, evaluate, perplexity, read, record
from optimum_eggs.evaluation.windows import evaluation_windows
from optimum_eggs.nn import packed_layers
from optimum_eggs.sharing import model_card

SIZE = {"seq_len": 16, "num_windows": 3}
EVALUATE = sys.modules["optimum_eggs.evaluation.evaluate"]  # the package has a function of that name


def refuse(*arguments, **options):
    raise AssertionError("a model was loaded")


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
        assert dataclasses.replace(theirs, folder=None, size=ours.size, text_uses=[]) == ours
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
        ({"model": "some/id"}, ModelError, "some/id: there is no such folder; check the path"),
        ({"model": Path(__file__)}, ModelError, "is a file; name the folder of a saved model"),
        ({"model": tiny.make_model("llama")}, ConfigError, "a LlamaForCausalLM in memory: pass the model's tokenizer"),
        ({"text": "missing.txt"}, CalibrationError, "text='missing.txt': there is no such file"),
        ({"seq_len": 500}, CalibrationError, "seq_len=500 is more than the model's context of 128"),
        ({"text": ""}, CalibrationError, "text='' is empty"),
        ({"text": "https://a.org/a.txt"}, CalibrationError, "text='https://a.org/a.txt': a URL is not read"),
        ({"against": "some/id"}, ModelError, "some/id: there is no such folder"),
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
    monkeypatch.setattr(EVALUATE, "load_model", refuse)  # before anything is loaded
    with pytest.raises(error, match=message):
        evaluate(given.pop("model"), **given)


def test_windows_are_no_longer_than_the_context_unless_asked_for(packed_folder, text_file):
    found = evaluate(packed_folder, text=text_file, num_windows=2)
    assert (found.conditions.seq_len, found.model.perplexity.seq_len) == (128, 128)


def test_against_is_looked_for_first(packed_folder, dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(EVALUATE, "load_model", refuse)
    other = shutil.copytree(dense_folder, tmp_path / "other")
    (other / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"other: cannot load the model: .*not a valid JSON"):
        evaluate(packed_folder, other, text=text_file, **SIZE)


@pytest.mark.parametrize("written", ["[]", "no json", '{"evaluations": {}}', '{"tasks": [1]}', '{"layers": []}', "NaN"])
def test_a_damaged_report_is_found_first(written, packed_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(EVALUATE, "load_model", refuse)
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    (folder / "report.json").write_text(written)
    with pytest.raises(CheckpointError, match=r"report.json: .*; save the model again, or move the file away"):
        evaluate(folder, text=text_file, **SIZE)


def test_a_loss_that_is_not_finite_names_the_layer(packed_folder, dense_folder, text_file, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = (folder / "report.json").read_text()
    place = "the loss is NaN or infinite at token 1 of window 0, and the first such output is that of"
    with pytest.raises(NumericalError, match=rf"{folder}: {place} model.layers.1.post_attention_layernorm; look for"):
        evaluate(dense_folder, folder, text=text_file, **SIZE)
    assert main(["evaluate", str(folder), "--text", str(text_file), "--seq-len", "16"]) == 2
    assert (folder / "report.json").read_text() == before


def test_the_window_and_the_token_are_named_too(packed_folder, tokenizer, text_file):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    windows = evaluation_windows(text_file, tokenizer, 16, 3)
    never = int(windows[2, 5])
    plain = model.forward

    def forward(**inputs):
        output = plain(**inputs)
        output.logits[..., never] = -torch.inf
        return output

    model.forward = forward
    first = int((windows[:, 1:] == never).any(1).nonzero()[0])
    with pytest.raises(NumericalError, match=rf"at token \d+ of window {first}, .* that of LlamaForCausalLM; "):
        read([model], windows, 2, progress=False)


def test_the_text_that_a_model_was_made_on_is_known_again(packed_folder, text_file, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    report = json.loads((folder / "report.json").read_text()) | {"evaluations": []}
    sha = report["calibration"]["texts"][0]["sha256"]
    report["recovery"] = dict.fromkeys(("steps", "windows", "windows_held_out", "perplexity_before"), 4)
    report["recovery"] |= {"perplexity_after": 3, "texts": [{"name": "x", "split": None, "sha256": sha}]}
    report["recovery"] |= {"settings": {"train": ["text.txt"], "method": "lora", "seq_len": 16}}
    (folder / "report.json").write_text(json.dumps(report))
    other = tmp_path / "text.txt"  # of the same name, and not the same
    other.write_text(text_file.read_text()[::-1])
    copy = tmp_path / "renamed.txt"
    shutil.copy(text_file, copy)
    for text, uses in ((copy, ["calibrated", "trained"]), (other, [])):
        found = evaluate(folder, text=text, **SIZE)
        assert found.model.text_uses == found.to_dict()["model"]["text_uses"] == uses
        record(found)
    rows = [line for line in str(model_card(folder)).splitlines() if line.startswith("| perplexity |")]
    assert "renamed.txt, 3 windows of 16 tokens, float32; the model was also calibrated and trained on it |" in rows[0]
    assert "text.txt, 3 windows of 16 tokens, float32 |" in rows[1]


def test_texts_without_a_digest_are_known_by_name_and_split():
    def uses(report, **text):
        return text_uses(report, text)

    old = {
        "calibration": {"windows": 1},
        "config": {"calibration": {"a.txt": 1.0}},
        "recovery": {"settings": {"train": ["b"]}},
    }
    assert uses(old, name="a.txt", split=None, sha256="f00") == ["calibrated"]
    assert uses(old, name="b", split="test", sha256=None) == ["trained"]
    new = {"calibration": {"texts": [{"name": "c4", "split": "train", "sha256": None}]}}
    assert uses(new, name="c4", split="train", sha256=None) == ["calibrated"]
    assert uses(new, name="c4", split="validation", sha256=None) == uses({}, name="c4") == []
    assert uses(new, name="c4", split="train[:1000]", sha256=None) == ["calibrated"]
    assert uses(new, name="c4", split="validation[:1000]", sha256=None) == []
    full = "Salesforce/wikitext:wikitext-2-raw-v1"
    for name, other in ((full, "wikitext2"), ("wikitext2", f"{full}@main")):
        report = {"recovery": {"texts": [{"name": name, "split": "train[:10%]", "sha256": None}]}}
        assert uses(report, name=other, split="train", sha256=None) == ["trained"]
        assert uses(report, name="Salesforce/wikitext:wikitext-103-v1", split="train", sha256=None) == []


def test_a_data_set_is_known_by_its_configuration_where_that_is_given_apart(monkeypatch):
    monkeypatch.setattr(
        "optimum_eggs.engine.run.token_windows", lambda *arguments, **options: Windows(torch.zeros(1, 8))
    )

    def names(source, **apart):
        return [text["name"] for text in calibration_windows(source, None, EGGSConfig(seq_len=8, **apart)).texts]

    apart = {"dataset_config_name": "en", "dataset_revision": "v2"}
    assert names("me/data", **apart) == ["me/data:en@v2"]
    assert names({"me/data:de": 1.0, "sample": 1.0}, **apart) == ["me/data:de@v2", "sample"]
    assert names(__file__, **apart) == ["test_evaluate.py"]
    report = {"calibration": {"texts": calibration_windows("me/data", None, EGGSConfig(seq_len=8, **apart)).texts}}
    for name, uses in (("me/data:en", ["calibrated"]), ("me/data:de", [])):
        assert text_uses(report, {"name": name, "split": "train", "sha256": None}) == uses


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


def test_ids_beyond_the_vocabulary_are_refused(packed_folder, tmp_path):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 999, 4] * 16}) + "\n")
    with pytest.raises(CalibrationError, match="token ids run from 1 to 999, and the model's vocabulary has"):
        evaluate(packed_folder, text=str(tmp_path / "ids.jsonl"), seq_len=16)
