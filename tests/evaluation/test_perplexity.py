from __future__ import annotations

import math

import datasets
import pytest
import tiny
import torch
import transformers

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.errors import CalibrationError, ConfigError, ModelError
from optimum_eggs.evaluation import model_size, perplexity
from optimum_eggs.evaluation.windows import evaluation_windows
from optimum_eggs.nn import packed_layers

WINDOWS = tiny.make_windows(5, 12)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_mean_over_all_predicted_tokens(batch_size):
    model = tiny.make_model("llama")
    total, count = 0.0, 0
    with torch.no_grad():
        for window in WINDOWS:
            chances = model(input_ids=window[None]).logits[0].double().softmax(-1)
            for position in range(len(window) - 1):
                total -= math.log(chances[position, window[position + 1]])
                count += 1
    result = perplexity(model, WINDOWS, batch_size)
    assert result.tokens == count == 55
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (result.windows, result.seq_len) == WINDOWS.shape


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny.make_model("bert"), "predicts masked tokens, not next ones"),
        (transformers.LlamaModel(tiny.make_model("llama").config), "gives no logits for every token"),
    ],
)
def test_a_model_that_predicts_no_next_token_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        perplexity(model, WINDOWS)


def test_windows_are_consecutive_and_the_rest_is_left_out(tokenizer, text_file):
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    windows = evaluation_windows(text_file, tokenizer, 16)
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert torch.equal(evaluation_windows(text_file, tokenizer, 16, 3), windows[:3])


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_data_set_has_the_tokens_that_published_scripts_count(name, tokenizer, monkeypatch):
    rows = ["", " = A title = \n", "", " A line of a row . \n", " another ... \n", "", "", "two\n\nlines"] * 3000
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: datasets.Dataset.from_dict({"text": rows}))
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    windows = evaluation_windows(name, tokenizer, 64, split="validation")
    assert windows.flatten().tolist() == ids[: len(ids) // 64 * 64]


@pytest.mark.parametrize(("seq_len", "count"), [(1, None), (16, 0)])
def test_bad_sizes_are_refused(tokenizer, text_file, seq_len, count):
    with pytest.raises(ConfigError, match="must be 2 or more"):
        evaluation_windows(text_file, tokenizer, seq_len, count)


def test_a_text_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(CalibrationError, match=r"has \d+ tokens, and 1 windows of seq_len=16 need 16"):
        evaluation_windows(["abc"], tokenizer, 16)
    with pytest.raises(CalibrationError, match=r"and 99 windows of seq_len=16 need 1584"):
        evaluation_windows(["abc abc"], tokenizer, 16, 99)


def test_sizes_count_what_the_pattern_keeps(tmp_path):
    model = tiny.make_model("llama")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    pruner = EGGSPruner(model)
    report = pruner.prune(EGGSConfig("1:4", num_samples=5, seq_len=12), calibration=WINDOWS)
    pruner.save_pretrained(tmp_path / "packed")
    pruned = sum(layer.out_features * layer.in_features for layer in report.layers)
    size = model_size(model, tmp_path / "packed")
    assert size.parameters == parameters
    assert size.parameters_kept == parameters - pruned * 3 // 4
    assert size.pruned_layer_bytes == pruned + pruned // 8  # a quarter of the values in 4 bytes, and a bit for each
    dense = model_size(tiny.make_model("llama"), tmp_path / "dense", packed_layers(model))
    assert dense.pruned_layer_bytes == 4 * pruned
    assert dense.parameters == dense.parameters_kept == parameters
