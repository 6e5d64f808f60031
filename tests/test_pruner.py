from __future__ import annotations

import json

import pytest
import tiny
import torch
from optimum.quantization_base import OptimumQuantizer

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.engine.run import with_seq_len
from optimum_eggs.errors import CalibrationError, ConfigError, ModelError, NumericalError, OutputError
from optimum_eggs.presets import SEQ_LEN


def test_it_is_an_optimum_quantizer():
    assert issubclass(EGGSPruner, OptimumQuantizer)
    assert EGGSPruner.quantize is EGGSPruner.prune


def test_a_pattern_is_enough(tokenizer):
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    ids = tiny.make_windows(128, 16)
    with pytest.raises(ModelError, match="the model is not pruned yet"):
        pruner.save_pretrained("nowhere")
    report = pruner.prune(EGGSConfig("1:4", seq_len=16), calibration=ids)
    assert report.config["n"] == 1
    assert pruner.report is report
    assert report.calibration["source"] == "Tensor in memory"


def test_windows_are_as_long_as_the_model_reads_unless_told_otherwise(tokenizer, text_file):
    positions = tiny.make_model("gpt2").config.max_position_embeddings
    assert positions < SEQ_LEN
    pruner = EGGSPruner(tiny.make_model("gpt2"), tokenizer)
    given = EGGSConfig("2:4", num_samples=4)
    report = pruner.prune(given, calibration=text_file)
    assert report.config["seq_len"] == report.calibration["seq_len"] == positions
    assert given.seq_len is None
    assert with_seq_len(given, torch.nn.Linear(2, 2)).seq_len == SEQ_LEN
    with pytest.raises(
        CalibrationError, match=rf"seq_len={positions + 1} is more than the model's context of {positions}"
    ):
        EGGSPruner(tiny.make_model("gpt2"), tokenizer).prune(
            EGGSConfig("2:4", num_samples=4, seq_len=positions + 1), calibration=text_file
        )


def test_the_report_says_that_windows_overlap(tokenizer, config):
    texts = [tiny.make_text(60)]
    report = EGGSPruner(tiny.make_model("llama"), tokenizer).prune(config, calibration=texts)
    assert report.calibration["overlapping"] is True
    report = EGGSPruner(tiny.make_model("llama"), tokenizer).prune(config, calibration=texts * 20)
    assert report.calibration["overlapping"] is False


def test_the_saved_folder_is_complete_and_names_no_local_folder(packed_folder, text_file):
    files = {path.name for path in packed_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"} <= files
    saved = json.loads((packed_folder / "config.json").read_text())["quantization_config"]
    assert saved["calibration"] == "text.txt"
    report = json.loads((packed_folder / "report.json").read_text())
    assert report["config"] == saved
    assert report["calibration"]["source"] == "text.txt"
    card = (packed_folder / "README.md").read_text()
    assert f'AutoModelForCausalLM.from_pretrained("{packed_folder.name}")' in card
    assert "8 windows of 16 tokens" in card
    assert "partial" not in card
    for path in ("config.json", "report.json", "README.md"):
        assert str(text_file.parent) not in (packed_folder / path).read_text()


def test_a_folder_that_is_not_empty_is_refused(dense_folder, config, tmp_path, text_file):
    pruner = EGGSPruner.from_pretrained(dense_folder)
    pruner.prune(config, calibration=text_file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for overwrite, message in ((False, "exists and is not empty"), (True, "has no list of files")):
        with pytest.raises(OutputError, match=message):
            pruner.save_pretrained(tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_that_fails_leaves_nothing(dense_folder, config, tmp_path, text_file, monkeypatch):
    pruner = EGGSPruner.from_pretrained(dense_folder)
    pruner.prune(config, calibration=text_file)
    monkeypatch.setattr(pruner.report, "save", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pruner.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_half_pruned_model_is_not_saved_nor_pruned_again(tokenizer, config, tmp_path, text_file):
    model = tiny.make_model("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    pruner = EGGSPruner(model, tokenizer)
    with pytest.raises(NumericalError):
        pruner.prune(config, calibration=text_file)
    for call in (lambda: pruner.save_pretrained(tmp_path / "out"), lambda: pruner.prune(config, text_file)):
        with pytest.raises(ModelError, match="half pruned; load it again"):
            call()
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_the_model_ready_for_another_try(tokenizer, config, text_file):
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        pruner.prune(EGGSConfig("2:4", num_samples=8, seq_len=16, targets=["nothing"]), calibration=text_file)
    with pytest.raises(ConfigError, match="pass an EGGSConfig or a pattern"):
        pruner.prune({"n": 2})
    assert len(pruner.prune(config, calibration=text_file).layers) == 14


def test_saving_in_another_dtype_casts_parameters_only(dense_folder, config, tmp_path, text_file):
    pruner = EGGSPruner.from_pretrained(dense_folder)
    pruner.prune(config, calibration=text_file)
    pruner.save_pretrained(tmp_path / "out", dtype="bfloat16")
    assert {parameter.dtype for parameter in pruner.model.parameters()} == {torch.bfloat16}
    assert pruner.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_without_fractions_changes_nothing(tokenizer, config, tmp_path, text_file):
    pruner = EGGSPruner(tiny.make_model("llama").requires_grad_(False), tokenizer)
    pruner.prune(config, calibration=text_file)
    with pytest.raises(ConfigError, match="int8 holds no fractions"):
        pruner.save_pretrained(tmp_path / "out", dtype=torch.int8)
    assert pruner.model.dtype == torch.float32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", r"/no/such/folder: there is no such folder; check the path"),
        ("empty", r"there is no config.json in it; pass the folder of a saved model"),
    ],
)
def test_a_model_that_is_not_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        EGGSPruner.from_pretrained(tmp_path / name if name == "empty" else name)
