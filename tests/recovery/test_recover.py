"""`recover` from its settings to the folder it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from oracles import gaussian
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from optimum_eggs import folders
from optimum_eggs.cli.main import main
from optimum_eggs.engine.report import read_report, text_uses, update_report, used_texts
from optimum_eggs.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ModelError,
    NumericalError,
    OutputError,
)
from optimum_eggs.evaluation import Perplexity
from optimum_eggs.folders import claimed
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers
from optimum_eggs.quantize import quantize
from optimum_eggs.recovery import estimate
from optimum_eggs.recovery.distill import block_error, teacher_tokens
from optimum_eggs.recovery.loss import distillation_loss
from optimum_eggs.recovery.recover import RecoverySettings, recover
from optimum_eggs.recovery.trainer import RecoveryTrainer
from optimum_eggs.report import report_page

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = {"seq_len": 16, "batch_size": 2, "steps": 4, "evaluations": 2, "rank": 2}


RECOVER = sys.modules["optimum_eggs.recovery.recover"]  # the package has a function of that name


def settings(text_file, **values):
    return RecoverySettings([str(text_file)], **(SMALL | values))


@pytest.fixture
def _not_worse(monkeypatch):
    """What was trained is kept, although it was trained on nothing that a random model could learn."""
    monkeypatch.setattr(RECOVER, "perplexity", lambda *arguments: Perplexity(2.0, 0.7, 1, 1, 1))


def test_the_teachers_tokens(dense_folder):
    model = AutoModelForCausalLM.from_pretrained(dense_folder).eval()
    windows = tiny.make_windows(3, 8)
    found = teacher_tokens(model, windows, top_k=4, progress=False)
    assert found.ids.shape == found.log_probs.shape == (3, 8, 4)
    with torch.no_grad():
        expected = model(input_ids=windows[1:2]).logits[0].log_softmax(-1).topk(4)
    assert torch.equal(found.ids[1].long(), expected.indices)
    torch.testing.assert_close(found.log_probs[1].float(), expected.values, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_nothing_is_called_by_a_name_of_the_past(gradient_checkpointing, packed_folder, text_file, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        given = settings(text_file, gradient_checkpointing=gradient_checkpointing)
        assert recover(packed_folder, tmp_path / "out", given).steps == 4


@pytest.mark.parametrize("has_them", [True, False])
def test_products_are_in_bfloat16_where_the_device_has_instructions_for_them(
    has_them, packed_folder, dense_folder, text_file, tmp_path, monkeypatch
):
    found = {True: set(), False: set()}

    def forward(self, x, plain=LlamaMLP.forward):
        found[self.training].add(torch.is_autocast_enabled("cpu"))
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(RECOVER, "has_bfloat16_products", lambda device: has_them)
    recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(dense_folder)), device="cpu")
    assert RECOVER._in_bfloat16(torch.device("xpu"))  # nothing is known of others
    assert found[True] == {has_them}
    assert (True in found[False]) is has_them  # the teacher; what judges is exact


@pytest.mark.parametrize("method", ["lora", "values"])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.usefixtures("_not_worse")
def test_recovery_keeps_the_mask_and_writes_a_packed_model(
    method, taught, packed_folder, dense_folder, text_file, tmp_path
):
    teacher = str(dense_folder) if taught else None
    report = recover(packed_folder, tmp_path / "out", settings(text_file, method=method, teacher=teacher))
    assert report.steps == 4
    assert len(report.held_out_loss) == 2
    assert inspect_checkpoint(tmp_path / "out").ok
    before, after = (
        packed_layers(AutoModelForCausalLM.from_pretrained(folder)) for folder in (packed_folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].weight_meta, layer.weight_meta) for name, layer in after.items())
    assert any(not torch.equal(before[name].weight, layer.weight) for name, layer in after.items())
    assert all(before[name].weight.dtype == layer.weight.dtype for name, layer in after.items())
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["recovery"]["perplexity_after"] == report.perplexity_after
    assert written["layers"]  # of the pruning
    assert str(text_file.parent) not in json.dumps(written)  # the report is published
    assert str(dense_folder.parent) not in json.dumps(written)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"4 steps of `{method}`" in card
    assert str(text_file.parent) not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no checkpoint is left


@pytest.mark.parametrize("method", ["lora", "values"])
def test_training_lowers_the_perplexity_on_text_held_out(method, packed_folder, text_file, tmp_path):
    chosen = settings(text_file, method=method, steps=60, learning_rate=0.2, rank=8)
    found = recover(packed_folder, tmp_path / "out", chosen)

    assert found.perplexity_after < 0.97 * found.perplexity_before  # the text is nearly random


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_decay_as_the_arguments_say(decay, packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    model.model.norm.weight.requires_grad_(True)
    arguments = TrainingArguments(str(tmp_path), weight_decay=decay, use_cpu=True, report_to=[])
    optimizer = RecoveryTrainer(model, arguments).create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay] * len(optimizer.param_groups)


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_the_loss_is_the_share_of_the_teacher_and_the_rest_of_the_text(ratio, packed_folder, dense_folder, tmp_path):
    model, teacher = map(AutoModelForCausalLM.from_pretrained, (packed_folder, dense_folder))
    ids = torch.arange(48).view(3, 16) % model.config.vocab_size
    taught = teacher_tokens(teacher, ids, top_k=8, progress=False)
    with torch.no_grad():
        logits = model(ids).logits
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    apart = distillation_loss(logits.flatten(0, 1), taught.ids.flatten(0, 1), taught.log_probs.flatten(0, 1))
    trainer = RecoveryTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), kd_ratio=ratio)
    inputs = {"input_ids": ids, "labels": ids, "teacher_ids": taught.ids, "teacher_log_probs": taught.log_probs}
    torch.testing.assert_close(trainer.compute_loss(model, inputs), ratio * apart + (1 - ratio) * text)


@pytest.mark.slow
def test_the_same_call_goes_on_after_a_kill(packed_folder, text_file, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "optimum_eggs", "recover", str(packed_folder), str(out)]
    command += ["--train", str(text_file), "--steps", "400", "--seq-len", "16", "--batch-size", "2", "--rank", "2"]
    work = tmp_path / ".out.unfinished"

    def stopped_after_a_checkpoint(how):
        seen = set(work.glob("*/checkpoint-*/trainer_state.json"))
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
        )
        deadline = time.monotonic() + 240
        while not set(work.glob("*/checkpoint-*/trainer_state.json")) - seen:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        return process.wait(), process.stderr.read()

    code, said = stopped_after_a_checkpoint(signal.SIGINT)
    assert code == 130
    assert "goes on from the last checkpoint" in said
    stopped_after_a_checkpoint(signal.SIGKILL)
    assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    state = json.loads((out / "report.json").read_text())["recovery"]
    assert state["steps"] > 0
    assert inspect_checkpoint(out).ok
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "values"])
@pytest.mark.parametrize("held_out", [0, 0.05])
def test_an_interrupted_run_does_the_steps_that_are_left_and_ends_the_same(
    held_out, method, packed_folder, text_file, tmp_path, monkeypatch, capsys
):
    chosen = settings(text_file, method=method, steps=8, evaluations=4, held_out=held_out)
    recover(packed_folder, tmp_path / "whole", chosen)
    done, plain = [], RecoveryTrainer.training_step

    def step(self, *arguments, **options):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(self.state.global_step)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(RecoveryTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        recover(packed_folder, tmp_path / "cut", chosen)
    assert not (tmp_path / "cut").exists()
    (run,) = (tmp_path / ".cut.unfinished").glob("run-*")
    (run / "checkpoint-6").mkdir()  # as a kill in the middle of writing leaves it
    done.append(None)
    capsys.readouterr()
    report = recover(packed_folder, tmp_path / "cut", chosen)
    assert "8 steps of 2 x 16 tokens, 4 of them done\nabout" in capsys.readouterr().err
    assert done == [0, 1, 2, 3, 4, None, 4, 5, 6, 7]  # the last checkpoint was that of step 4
    assert report.steps == 8
    whole, cut = (packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("whole", "cut"))
    for name, layer in whole.items():
        torch.testing.assert_close(cut[name].weight, layer.weight, rtol=1e-5, atol=1e-6)


def test_windows_are_no_longer_than_the_context_unless_asked_for(packed_folder, tmp_path):
    (tmp_path / "long.txt").write_text(tiny.make_text(20000))
    asked = RecoverySettings([str(tmp_path / "long.txt")], steps=1, batch_size=1, rank=2)
    report = recover(packed_folder, tmp_path / "out", asked)
    assert report.settings["seq_len"] == 128


def test_what_a_run_of_other_settings_has_left_is_not_in_the_way(
    packed_folder, text_file, tmp_path, monkeypatch, caplog
):
    def interrupted(self, *arguments, **options):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    plain = RecoveryTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(packed_folder, tmp_path / "out", settings(text_file, steps=2))
    recover(packed_folder, tmp_path / "out", settings(text_file, steps=1))
    assert "steps was 2 and is now 1); this one starts from the beginning" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_output_is_decided_on_before_the_work(packed_folder, dense_folder, text_file, tmp_path, monkeypatch):
    for out in (packed_folder, dense_folder):
        with pytest.raises(OutputError, match="itself, which is read"):
            recover(packed_folder, out, settings(text_file, teacher=str(dense_folder)), overwrite=True)
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match="is writing to it"):
        recover(packed_folder, tmp_path / "out", settings(text_file))
    monkeypatch.setattr("optimum_eggs.folders.shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(OutputError, match=r"will be written, and .* are free there"):
        recover(packed_folder, tmp_path / "out", settings(text_file, method="values"))
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_is_not_said_of_the_recovered_model(packed_folder, text_file, tmp_path):
    shutil.copytree(packed_folder, tmp_path / "before")
    judged = {"dataset": "d", "conditions": "c", "metrics": {"perplexity": 1.0}}
    speed = {"machine": {"processor": "p", "threads": 1}, "models": [{"decode_speed": 2.0, "prefill_speed": 4.0}]}
    update_report(tmp_path / "before", evaluations=[judged], benchmark=speed)
    recover(tmp_path / "before", tmp_path / "after", settings(text_file, steps=1))
    report = read_report(tmp_path / "after")
    assert "recovery" in report
    assert "evaluations" not in report
    assert "benchmark" not in report


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "full"}, "method='full'"),
        ({"steps": 0}, "steps=0"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": -0.1}, "held_out=-0.1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"block_matching": -1.0}, "block_matching=-1.0"),
        ({"block_matching": 1.0}, "needs a teacher"),
        ({"kd_ratio": 0.0, "teacher": "dense"}, "kd_ratio=0.0"),
        ({"kd_ratio": 1.5, "teacher": "dense"}, "kd_ratio=1.5"),
        ({"kd_ratio": 0.5}, "kd_ratio=0.5 needs a teacher"),
    ],
)
def test_settings_out_of_range(values, message, text_file):
    with pytest.raises(ConfigError, match=message):
        settings(text_file, **values)


def test_bad_input_leaves_nothing(packed_folder, dense_folder, text_file, tmp_path, monkeypatch, tmp_path_factory):
    short = tmp_path_factory.mktemp("short") / "short.txt"
    short.write_text(text_file.read_text()[:80])
    with pytest.raises(ModelError, match="no packed layer"):
        recover(dense_folder, tmp_path / "out", settings(text_file))
    with pytest.raises(CalibrationError, match="needs four"):
        recover(packed_folder, tmp_path / "out", settings(short))
    with pytest.raises(CalibrationError, match="seq_len=129 is more than the model's context of 128 tokens"):
        recover(packed_folder, tmp_path / "out", settings(text_file, seq_len=129))
    with pytest.raises(ModelError, match="there is no such folder"):
        recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(tmp_path / "nowhere")))
    with pytest.raises(CalibrationError, match=r"train='.*no.txt': there is no such file"):
        recover(packed_folder, tmp_path / "out", settings(tmp_path / "no.txt"))
    with pytest.raises(ModelError, match="there is no such folder"):
        recover(tmp_path / "nowhere", tmp_path / "out", settings(text_file))
    with monkeypatch.context() as patch:
        patch.setattr("optimum_eggs.recovery.recover.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="needs PEFT"):
            recover(packed_folder, tmp_path / "out", settings(text_file))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        recover(packed_folder, tmp_path / "full", settings(text_file))
    with pytest.raises(ConfigError, match="train="):
        RecoverySettings([])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.fixture
def _nothing_is_loaded(monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(RECOVER, "load_model", loaded)


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_teacher_is_another_dense_model_of_the_same_tokenizer(
    packed_folder, dense_folder, text_file, tokenizer, tmp_path
):
    def refused(error, message, teacher):
        with pytest.raises(error, match=message):
            recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(teacher)))

    (tmp_path / "link").symlink_to(packed_folder)
    for itself in (packed_folder, tmp_path / "link", packed_folder / ".." / packed_folder.name):
        refused(ConfigError, r"teacher='.*' is the model that is trained; name the dense model", itself)
    refused(
        ModelError, r"copy' is a packed model; name the dense one", shutil.copytree(packed_folder, tmp_path / "copy")
    )
    other = shutil.copytree(dense_folder, tmp_path / "other")
    (other / "config.json").write_text("{")
    refused(ModelError, r"other: cannot load the model", other)
    config = json.loads((dense_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    refused(ModelError, r"other' has a vocabulary of 300, the model one of 256", other)
    (other / "config.json").write_text(json.dumps(config))
    plain = json.loads((other / "tokenizer.json").read_text())
    plain["model"]["merges"] = plain["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(plain))
    refused(ModelError, r"other': its tokenizer cuts the text differently", other)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_damaged_report_is_found_first(packed_folder, text_file, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    (folder / "report.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"report.json: holds \[\], no report"):
        recover(folder, tmp_path / "out", settings(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])  # by `accelerate launch`
def test_after_training_the_model_is_judged_as_before_it(launched, packed_folder, text_file, tmp_path, monkeypatch):
    # in float32, though it is trained by rounded products; the first step, which is the best, changes nothing
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(RECOVER, "has_bfloat16_products", lambda device: True)
    chosen = settings(text_file, method="values", learning_rate=30.0, steps=2)
    report = recover(packed_folder, tmp_path / "out", chosen, device="cpu")
    assert report.held_out_loss[0] < report.held_out_loss[1]
    assert report.perplexity_after == report.perplexity_before
    assert report.kept == "after"


def test_training_that_makes_it_worse_keeps_what_was(packed_folder, text_file, tmp_path, capsys):
    before = shutil.copytree(packed_folder, tmp_path / "before")
    report = json.loads((before / "report.json").read_text()) | {"evaluations": [], "benchmark": None}
    (before / "report.json").write_text(json.dumps(report))
    command = ["recover", str(before), str(tmp_path / "out"), "--train", str(text_file), "--lr", "30", "--steps", "20"]
    assert main([*command, "--seq-len", "16", "--batch-size", "2", "--method", "values"]) == 0
    assert "training made it worse: the values of before were kept" in capsys.readouterr().out
    found = read_report(tmp_path / "out")
    recovery = found["recovery"]
    assert recovery["perplexity_after"] > recovery["perplexity_before"]
    assert (recovery["kept"], recovery["texts"]) == ("before", [])
    assert found["evaluations"] == []  # still true of it
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "raised the perplexity on the windows held out, so the values are those of before." in card
    assert "perplexity after recovery" not in card


@pytest.mark.usefixtures("_not_worse")
def test_the_texts_of_every_recovery_are_known(packed_folder, text_file, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"a": "x", "b": "some words " * 99}) + "\n" for _ in "abc"))
    assert recover(packed_folder, tmp_path / "one", settings(text_file, steps=1)).kept == "after"
    with pytest.raises(CalibrationError, match=r"train='.*rows.jsonl' has the columns of texts \['a', 'b'\]"):
        recover(tmp_path / "one", tmp_path / "two", settings(tmp_path / "rows.jsonl", steps=1))
    chosen = settings(tmp_path / "rows.jsonl", steps=1, text_column="b")
    texts = recover(tmp_path / "one", tmp_path / "two", chosen).texts
    assert [text["name"] for text in texts] == [text_file.name, "rows.jsonl"]
    assert read_report(tmp_path / "two")["recovery"]["texts"] == texts
    assert len(texts[0]["sha256"]) == 64
    quantize(tmp_path / "two", tmp_path / "int8", {"values": "int8"}, progress=False)
    report = read_report(tmp_path / "int8")
    assert used_texts(report)["trained"] == texts
    assert report["recovery"]["perplexity_after"] is None  # it is of the values before they were rounded
    assert text_uses(report, {"name": text_file.name, "split": None, "sha256": texts[0]["sha256"]}) == [
        "calibrated",
        "trained",
    ]
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "# and then: optimum-cli eggs recover out recovered --method lora --steps 1 --train ..." in card
    assert card.index("eggs recover out") < card.index("eggs quantize recovered rounded --values int8")
    assert "perplexity after recovery" not in card


def test_one_text_may_be_given_by_itself():
    assert RecoverySettings("sample") == RecoverySettings(["sample"])
    with pytest.raises(ConfigError, match=r"train=\[\]: name at least one text"):
        RecoverySettings("")


def test_a_text_given_twice(text_file):
    with pytest.raises(ConfigError, match=r"train='.*' is given twice, as '.*' too"):
        RecoverySettings([str(text_file), str(text_file.parent / "." / ".." / text_file.parent.name / "text.txt")])


def test_a_loss_that_is_not_finite_names_the_step_and_the_layer(packed_folder, text_file, tmp_path, monkeypatch):
    plain, left = LlamaMLP.forward, [0]

    def forward(self, x):
        left[0] -= 1
        return plain(self, x) * (torch.nan if left[0] < 0 else 1)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    judged = r"at token 1 of window 0, and the first such output is that of model.layers.0.mlp;"
    trained = r"^step 2: the loss is .* of model.layers.0.mlp in the model; use a smaller"
    for passes, place in ((0, judged), (3, trained)):
        left[0] = passes * 2  # there are two blocks
        with pytest.raises(NumericalError, match=place):
            recover(packed_folder, tmp_path / "out", settings(text_file), overwrite=True)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_finite_names_its_layer(packed_folder, dense_folder, text_file, tmp_path):
    other = shutil.copytree(dense_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] = torch.inf
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"the teacher's predictions .* is that of model.layers.1.mlp.up_proj; look"
    ):
        recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(other)))


def test_a_gradient_that_is_not_finite_names_the_layer(packed_folder, text_file, tmp_path, monkeypatch):
    plain = RECOVER.packed_layers

    def watched(model):
        layers = plain(model)
        weight = layers["model.layers.1.mlp.up_proj"].weight
        if weight.requires_grad is False and not weight._backward_hooks:
            weight.requires_grad_(True).register_hook(lambda grad: grad * torch.inf)
        return layers

    monkeypatch.setattr(RECOVER, "packed_layers", watched)
    with pytest.raises(
        NumericalError, match=r"^step 1: the gradient of model.layers.1.mlp.up_proj.weight is NaN or inf"
    ):
        recover(packed_folder, tmp_path / "out", settings(text_file, method="values"))


def test_the_command(packed_folder, text_file, tmp_path, capsys):
    sizes = ["--steps", "2", "--seq-len", "16", "--batch-size", "2", "--method", "values"]
    command = ["recover", str(packed_folder), str(tmp_path / "out"), "--train", str(text_file), *sizes]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    said = capsys.readouterr()
    assert "perplexity on the" in said.out
    assert re.search(r"the packed values of 14 layers, 2 steps of 2 x 16 tokens\nabout \d+ \w+; fewer", said.err)


def test_texts_are_mixed_by_their_shares(packed_folder, text_file, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(tiny.make_text(4000, seed=1))
    command = ["recover", str(packed_folder), str(tmp_path / "out"), "--steps", "4", "--seq-len", "16", "--rank", "2"]
    assert main([*command, "--train", f"{text_file}=3", "--train", str(other), "--batch-size", "1", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["settings"]["train"] == {"text.txt": 3.0, "other.txt": 1.0}
    assert done["windows"] == 4
    assert [text["name"] for text in done["texts"]] == ["text.txt", "other.txt"]
    assert main([*command, "--overwrite", "--train", f"{text_file}=0"]) == 2
    assert "train: the share 0.0 of" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{}, {"method": "values", "block_matching": 0.5, "steps": 6}])
def test_the_passes_to_come_are_counted(values, dense_folder, packed_folder, text_file, tmp_path, monkeypatch):
    foretold, read = [], []

    def passes(*given):
        foretold.append(estimate.passes(*given))
        read.clear()
        return foretold[-1]

    plain = LlamaModel.forward
    monkeypatch.setattr(estimate, "_STEP", {torch.float32: 1, torch.bfloat16: 1})
    monkeypatch.setattr(RECOVER, "passes", passes)
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda self, input_ids, **given: read.append(len(input_ids)) or plain(self, input_ids, **given),
    )
    recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(dense_folder), patience=9, **values))
    assert foretold == [sum(read)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([5, 7, 6, 5.5, 5.2, 4, 3, 2], 8),  # worse than at first for long, and far better at the end
        ([5, 6, 4, 4, 4, 5, 3, 2], 8 - 2),
        ([5, 5, 5, 5, 1, 1, 1, 1], 4),
    ],
)
def test_training_ends_when_what_is_held_out_got_no_better_three_times_in_a_row(
    losses, steps, packed_folder, text_file, tmp_path, monkeypatch
):
    judged, plain = iter(losses), RecoveryTrainer.evaluation_loop

    def judge(self, *args, **given):
        found = plain(self, *args, **given)
        found.metrics["eval_loss"] = float(next(judged))
        return found

    monkeypatch.setattr(RecoveryTrainer, "evaluation_loop", judge)
    report = recover(packed_folder, tmp_path / "out", settings(text_file, steps=8, evaluations=8, patience=3))
    assert report.steps == steps
    assert report.held_out_loss == losses[:steps]


@pytest.mark.parametrize("method", ["lora", "values"])
@pytest.mark.parametrize("taught", [True, False])
def test_with_none_held_out_nothing_is_judged_and_the_last_state_stays(
    method, taught, packed_folder, dense_folder, text_file, tmp_path, monkeypatch, capsys
):
    judged, plain = [], RECOVER.perplexity
    monkeypatch.setattr(RECOVER, "perplexity", lambda model, ids: judged.append(ids) or plain(model, ids))
    monkeypatch.setattr(RecoveryTrainer, "evaluation_loop", None)
    given = {"method": method, "teacher": str(dense_folder) if taught else None, "learning_rate": 3.0}  # of harm
    report = recover(packed_folder, tmp_path / "out", settings(text_file, held_out=0, **given))
    assert (report.steps, report.windows, report.windows_held_out, report.kept) == (4, 8, 0, "after")
    assert [len(ids) for ids in judged] == [2]  # to tell how long it will take
    assert "about" in capsys.readouterr().err
    assert (report.perplexity_before, report.perplexity_after, report.held_out_loss) == (None, None, [])
    before, after = (
        packed_layers(AutoModelForCausalLM.from_pretrained(folder)) for folder in (packed_folder, tmp_path / "out")
    )
    assert all(torch.equal(before[name].weight_meta, layer.weight_meta) for name, layer in after.items())
    assert all(not torch.equal(before[name].weight, layer.weight) for name, layer in after.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Recovered afterwards under the mask: 4 steps of `{method}` on 8 windows" in card
    assert "perplexity after recovery" not in card
    assert "held out: before recovery" not in report_page(tmp_path / "out")


def test_a_short_text_is_trained_on_as_a_whole(packed_folder, tokenizer, text_file, tmp_path, capsys):
    (tmp_path / "short.txt").write_text(text_file.read_text()[:200])
    few = len(tokenizer((tmp_path / "short.txt").read_text())["input_ids"]) // 16
    assert 1 <= few < 4
    command = ["recover", str(packed_folder), str(tmp_path / "out"), "--train", str(tmp_path / "short.txt")]
    command += ["--steps", "3", "--seq-len", "16", "--batch-size", "2", "--method", "values"]
    assert main(command) == 2
    assert "training needs four; give more text, a smaller seq_len, or held_out=0" in capsys.readouterr().err
    assert main([*command, "--held-out", "0"]) == 0
    said = capsys.readouterr().out
    assert f"3 steps on {few} windows in " in said
    assert "no window was held out, so nothing was judged" in said


def test_steps_in_bfloat16_are_foretold_as_shorter(text_file):
    asked = settings(text_file, steps=10)
    whole, half = (estimate.passes(asked, 8, 2, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert whole - half == pytest.approx(1.6 * 10 * asked.batch_size)


def test_the_error_of_blocks():
    teacher = [gaussian(2, 3, 8), gaussian(2, 3, 8, seed=1)]
    student = [teacher[0] + 0.5 * gaussian(2, 3, 8, seed=2), teacher[1]]
    expected = float((student[0] - teacher[0]).norm() ** 2 / teacher[0].norm() ** 2) / 2
    assert float(block_error(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_not_worse")
def test_matching_blocks_brings_them_nearer_to_the_teachers(
    packed_folder, dense_folder, text_file, tokenizer, tmp_path
):
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][:128]).view(8, 16)

    def error(folder):
        with torch.no_grad():
            ours, theirs = (
                AutoModelForCausalLM.from_pretrained(which)(input_ids=ids, output_hidden_states=True).hidden_states[1:]
                for which in (folder, dense_folder)
            )
        return float(block_error(ours, theirs))

    common = {"method": "values", "teacher": str(dense_folder), "steps": 40, "learning_rate": 0.05}
    for weight in (0.0, 10.0):
        recover(packed_folder, tmp_path / str(weight), settings(text_file, block_matching=weight, **common))
    assert error(tmp_path / "10.0") < 0.9 * error(tmp_path / "0.0")
    assert error(tmp_path / "10.0") < 0.9 * error(packed_folder)


def test_an_interrupt_when_the_output_is_in_place_leaves_nothing_beside_it(
    packed_folder, text_file, tmp_path, monkeypatch
):
    exchange = folders._exchange
    monkeypatch.setattr(folders, "_exchange", lambda *paths: (exchange(*paths), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match=r"out is whole and in place$"):
        recover(packed_folder, tmp_path / "out", settings(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_asks_the_teacher_once(packed_folder, dense_folder, text_file, tmp_path, monkeypatch):
    asked = []

    def counted(*arguments, **options):
        asked.append(1)
        return teacher_tokens(*arguments, **options)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_eggs.recovery.recover.teacher_tokens", counted)
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(dense_folder)))
    recover(packed_folder, tmp_path / "out", settings(text_file, teacher=str(dense_folder)))
    assert asked == [1]
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "training_step", interrupted)
        teacher = shutil.copytree(dense_folder, tmp_path / "teacher")
        asked_of_it = settings(text_file, teacher=str(teacher))
        with pytest.raises(KeyboardInterrupt):
            recover(packed_folder, tmp_path / "again", asked_of_it)
        tiny.flip_a_bit(teacher / "model.safetensors")
        with pytest.raises(KeyboardInterrupt):
            recover(packed_folder, tmp_path / "again", asked_of_it)
    assert asked == [1, 1, 1]


@pytest.mark.slow
def test_two_processes_share_the_steps(packed_folder, dense_folder, text_file, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "optimum_eggs", "recover", str(packed_folder), str(tmp_path / "out"), "--json"]
    command += ["--train", str(text_file), "--teacher", str(dense_folder)]
    command += ["--steps", "4", "--seq-len", "16", "--batch-size", "2", "--rank", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 4  # printed once
    assert inspect_checkpoint(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
