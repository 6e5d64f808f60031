"""The command line: within this process, but where the start or the end of one is the point."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_eggs.cli.main import main
from optimum_eggs.cli.prune import parse_sources
from optimum_eggs.folders import check_output
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.ops import INSTRUCTION_SETS
from optimum_eggs.speed import time_layer

OPTIMUM_CLI = Path(sys.executable).with_name("optimum-cli")
SMALL = ["--num-samples", "8", "--seq-len", "16", "--set", "band=8"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def within(*arguments, code=0):
    """The same as `eggs`, within this process: a start of Python costs seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            returned = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            returned = exit.code
    done = Done(returned, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stderr
    return done


def eggs(*arguments, entry="module", code=0):
    """Run the command in a process of its own."""
    start = [str(OPTIMUM_CLI), "eggs"] if entry == "optimum-cli" else [sys.executable, "-m", "optimum_eggs"]
    done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["module", "optimum-cli"])
def test_prune_prints_one_json_object_and_nothing_else(entry, dense_folder, text_file, tmp_path):
    done = eggs("prune", dense_folder, tmp_path / "out", "--calibration", text_file, *SMALL, "--json", entry=entry)
    report = json.loads(done.stdout)
    assert report["summary"]["layers_pruned"] == 14
    assert report["config"]["preset"] is None  # band 8 is not the preset's
    assert "14 layers to 2:4" in done.stderr
    assert inspect_checkpoint(tmp_path / "out").ok


@pytest.mark.slow
def test_the_whole_road(dense_folder, text_file, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    printed = within(
        "prune", dense_folder, packed, "--calibration", text_file, *SMALL, "--save-dtype", "bfloat16"
    ).stdout
    assert "14 layers pruned to 2:4" in printed
    assert "lm_head" in printed

    printed = within("inspect", packed).stdout
    assert "model.layers.1.mlp.down_proj" in printed
    assert "14 packed layers" in printed
    assert "no violation" in printed
    found = json.loads(within("inspect", packed, "--json").stdout)
    assert found["ok"] is True
    report = json.loads((packed / "report.json").read_text())
    masks = {layer["name"]: layer["certificate"]["floors"] for layer in report["layers"]}
    assert {layer["name"]: layer["certificate"]["floors"] for layer in found["layers"]} == masks

    assert "14 layers made dense" in within("export", packed, dense, "--format", "dense").stdout
    code = (
        f"import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained({str(dense)!r}); "
        "assert 'optimum_eggs' not in sys.modules; print(float((m.model.layers[0].mlp.up_proj.weight == 0).sum()))"
    )
    zeros = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(zeros.stdout) >= 32 * 64 / 2

    options = ["--text", text_file, "--seq-len", "16", "--num-windows", "4"]
    both = json.loads(within("evaluate", packed, "--against", dense, *options, "--json").stdout)
    ours, theirs = (both[key]["perplexity"] for key in ("model", "against"))
    assert ours.keys() == theirs.keys()
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-7)  # its head sums in another order
    assert both["ratio"]["pruned_layer_bytes"] == 9 / 16
    assert both["model"]["perplexity"]["tokens"] == 4 * 15
    assert both["comparison"]["top1_agreement"]["value"] == 1
    assert both["comparison"]["kl_divergence"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-7)
    printed = within("evaluate", packed, "--against", dense, "--stride", "8", *options).stdout
    assert "with 95 % intervals" in printed
    assert "bits a byte" in printed
    assert "parameters kept" in printed


def test_only_a_dense_model_is_recorded_as_the_dense_one(packed_folder, dense_folder, text_file, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    options = ["--text", text_file, "--seq-len", "16", "--num-windows", "2"]
    within("export", packed_folder, tmp_path / "exported")
    for other, known in ((packed_folder, False), (tmp_path / "exported", False), (dense_folder, True)):
        within("evaluate", folder, "--against", other, *options)
        (entry,) = json.loads((folder / "report.json").read_text())["evaluations"]
        assert ("dense" in entry, "comparison" in entry) == (known, known)
        assert entry["metrics"]["perplexity"] > 1


def test_tuning_and_floors_are_options(dense_folder, text_file, tmp_path):
    options = ["--pattern", "4:8", "--preset", "best", "--block-tuning", "4"]
    sizes = ["--num-samples", "8", "--seq-len", "16", "--min-degree", "2"]
    done = within("prune", dense_folder, tmp_path / "out", "--calibration", text_file, *sizes, *options)
    assert "blocks tuned: mean error on the calibration windows 0." in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [block["steps"] for block in report["tuning"]] == [4, 4]
    assert all(layer["certificate"]["floors"][str(layer["band"])] >= 2 for layer in report["layers"])
    within("inspect", tmp_path / "out")
    done = within("prune", dense_folder, tmp_path / "no", "--calibration", text_file, "--min-degree", "some", code=2)
    assert "argument --min-degree: 'some' must be an integer of at least 0" in done.stderr
    assert not (tmp_path / "no").exists()


def test_every_key_can_be_set(dense_folder, text_file, tmp_path):
    keys = {
        "num_samples": 8,
        "seq_len": 16,
        "solver": "admm",
        "damping": 0.02,
        "permutation": True,
        "targets": ["mlp"],
        "ignore": ["lm_head", "layers.0"],
        "calibration": str(text_file),
    }
    settings = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    options = [part for setting in settings for part in ("--set", setting)]
    done = within("prune", dense_folder, tmp_path / "out", *options, "--seq-len", "16", "--json")  # twice the same
    report = json.loads(done.stdout)
    assert {key: report["config"][key] for key in keys} == keys | {"calibration": text_file.name}
    assert {layer["name"].split(".")[3] for layer in report["layers"]} == {"mlp"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "dampin=0.02"], "dampin=0.02: EGGSConfig has no such key; did you mean 'damping'?"),
        (["--set", "damping"], "--set 'damping': is not of the form KEY=VALUE"),
        (["--set", "=3"], "--set '=3': is not of the form KEY=VALUE"),
        (["--set", "damping=some"], "damping='some' must be a finite number"),
        (["--set", "damping=NaN"], "damping=nan must be a finite number"),
        (["--set", "seed=4", "--set", "seed=5"], "seed is given as 4 and as 5; give it once"),
        (["--num-samples", "128", "--set", "num_samples=64"], "num_samples is given as 128 and as 64; give it once"),
        (["--pattern", "2:4", "--set", "pattern=1:4"], "pattern is given as '2:4' and as '1:4'; give it once"),
        (["--set", "n=1", "--set", "m=4", "--pattern", "2:4"], "pattern='2:4' (--pattern) contradicts n=1, m=4"),
        (["--set", "calibration=other.txt"], "calibration is given as "),
        (["--set", "tokenizer=gpt2"], "tokenizer is not to be set, it is an object; the model's own is used"),
        (["--set", 'pruned_modules={"a": "2:4"}'], "pruned_modules is not to be set, the pruner writes it"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message, dense_folder, text_file, tmp_path):
    done = within("prune", dense_folder, tmp_path / "out", "--calibration", text_file, *options, code=2)
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_calibration_is_asked_for(dense_folder, tmp_path):
    done = within("prune", dense_folder, tmp_path / "out", code=2)
    assert "error: --calibration is missing: give a text file" in done.stderr


def test_perplexity_agrees_with_an_independent_sum(packed_folder, text_file, tokenizer):
    done = within("evaluate", packed_folder, "--text", text_file, "--seq-len", "16", "--num-windows", "3", "--json")
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in (0, 16, 32):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            total += 15 * float(model(window, labels=window).loss)
    expected = torch.tensor(total / 45).exp().item()
    assert json.loads(done.stdout)["model"]["perplexity"]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_without_calibration_it_says_what_there_is(dense_folder, tmp_path):
    done = within("prune", dense_folder, tmp_path / "out", code=2)
    assert done.stderr.startswith(
        "error: --calibration is missing: give a text file, the name of a data set ('wikitext2'"
    )
    assert "or 'sample', the text that is shipped with this package for a first try" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_may_name_a_configuration_and_a_revision():
    given = ["me/data.v1:plain@v2=3", "sample"]
    assert parse_sources(given) == {"me/data.v1:plain@v2": 3.0, "sample": 1.0}


def test_the_text_that_is_shipped(dense_folder, tmp_path):
    sources = ["--calibration", "sample"]
    report = json.loads(within("prune", dense_folder, tmp_path / "out", *sources, *SMALL, "--json").stdout)
    assert report["calibration"]["source"] == "sample"
    assert report["config"]["calibration"] == "sample"


@pytest.mark.slow
def test_spectra_are_measured_on_request_alone(dense_folder, text_file, tmp_path, monkeypatch):
    def asked(*arguments):
        raise AssertionError("spectra were measured")

    monkeypatch.setattr("optimum_eggs.masks.spectra.second_singular_value", asked)
    within("prune", dense_folder, tmp_path / "out", "--calibration", text_file, *SMALL)
    within("inspect", tmp_path / "out")
    within("benchmark", tmp_path / "out", *QUICK, "--layers-only")
    with pytest.raises(AssertionError, match="spectra were measured"):
        within("inspect", tmp_path / "out", "--spectra")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["https://example.org/a.txt"], "calibration='https://example.org/a.txt' (--calibration): a URL is not read"),
        (["-"], "calibration='-' (--calibration): standard input is not read"),
        ([""], "calibration='' (--calibration) is empty"),
        (["c4", "s3://bucket/a.txt"], "calibration='s3://bucket/a.txt' (--calibration): a URL is not read"),
        (["c4", "no.txt"], "calibration='no.txt' (--calibration): there is no such file"),
        (["sample=0"], "calibration: the share 0.0 of 'sample' is not a positive number"),
    ],
)
def test_sources_are_looked_at_before_the_model(sources, message, dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_eggs.streaming.prune.DenseSource", None)
    options = [part for source in sources for part in ("--calibration", source)]
    done = within("prune", dense_folder, tmp_path / "out", *options, code=2)
    assert message in done.stderr


def test_several_sources_are_mixed(dense_folder, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    sources = ["--calibration", f"{text_file}=3", "--calibration", other]
    report = json.loads(within("prune", dense_folder, tmp_path / "out", *sources, *SMALL, "--json").stdout)
    assert report["calibration"]["source"] == {"text.txt": 3.0, "other.txt": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--pattern", "4:2"], "pattern 4:2: n=4 is the number kept"),
        (["--pattern", "0:4"], "pattern 0:4: n=0"),
        (["--pattern", "2:5"], "pattern 2:5: m=5 is not a supported group size"),
        (["--pattern", "two:four"], "pattern='two:four' (--pattern) is not of the form"),
        (["--num-samples", "100000"], "tokens, and num_samples=100000 windows of seq_len=16 need 1600000"),
        (["--ignore", "downproj"], "ignore: the pattern 'downproj' matches no linear layer"),
        (["--preset", "best-ever"], "invalid choice: 'best-ever'"),
        (["--no-such-flag"], "eggs prune: error: unrecognized arguments: --no-such-flag\n"),
        (["--patern=2:4"], "eggs prune: error: unrecognized arguments: --patern=2:4; did you mean --pattern?"),
        (["--sed", "3"], "eggs prune: error: unrecognized arguments: --sed 3; did you mean --seed?"),
        (["--seed", "-1"], "argument --seed: '-1' must be an integer from 0 to 18446744073709551615"),
    ],
)
def test_wrong_options_exit_with_2_and_leave_nothing(changes, message, dense_folder, text_file, tmp_path):
    done = within("prune", dense_folder, tmp_path / "out", "--calibration", text_file, *SMALL, *changes, code=2)
    assert message in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_model_or_a_text_that_is_not_there(dense_folder, text_file, tmp_path):
    missing = tmp_path / "missing" / "model"
    done = within("prune", missing, tmp_path / "out", "--calibration", text_file, code=2)
    assert f"{missing}: there is no such" in done.stderr
    done = within("prune", dense_folder, tmp_path / "out", "--calibration", tmp_path / "no.txt", code=2)
    assert "there is no such file" in done.stderr
    (tmp_path / "empty.txt").write_text("")
    done = within("prune", dense_folder, tmp_path / "out", "--calibration", tmp_path / "empty.txt", *SMALL, code=2)
    assert "is empty, or holds nothing but white space; give a file with text in it" in done.stderr
    assert not (tmp_path / "out").exists()
    done = within("evaluate", "some/id", "--text", text_file, code=2)
    assert "some/id: there is no such folder" in done.stderr


def test_an_output_folder_that_is_not_empty(dense_folder, packed_folder, text_file, tmp_path):
    out = shutil.copytree(packed_folder, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    options = ["--calibration", text_file, *SMALL, "--pattern", "1:4"]
    done = within("prune", dense_folder, out, *options, code=2)
    assert "exists and is not empty; name another folder, or pass --overwrite" in done.stderr
    assert (out / "model.safetensors").read_bytes() == before
    within("prune", dense_folder, out, *options, "--overwrite")
    assert inspect_checkpoint(out).config["n"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_packed_model_is_not_pruned_again_and_a_dense_one_not_exported(
    dense_folder, packed_folder, text_file, tmp_path
):
    done = within("prune", packed_folder, tmp_path / "out", "--calibration", text_file, *SMALL, code=2)
    assert "is packed already" in done.stderr
    done = within("export", dense_folder, tmp_path / "out", code=2)
    assert "has no packed layers" in done.stderr
    done = within("inspect", dense_folder, code=2)
    assert "this model is not packed" in done.stderr


@pytest.mark.slow
def test_what_this_package_wrote_is_replaced_and_nothing_else(dense_folder, packed_folder, text_file, tmp_path):
    """Every command that makes a folder, on a model of its own that nobody may replace."""
    shutil.copytree(dense_folder, tmp_path / "dense")
    shutil.copytree(packed_folder, tmp_path / "packed")
    commands = [
        ("prune", "dense", "--calibration", text_file, *SMALL),
        ("pack", "dense"),
        ("export", "packed"),
        ("recover", "packed", "--train", text_file, "--steps", "1", "--seq-len", "16", "--batch-size", "1"),
    ]
    before = tree(tmp_path)
    for name, model, *options in commands:
        said = within(name, tmp_path / model, tmp_path / model, *options, "--overwrite", code=2).stderr
        assert "itself, which is read; name another folder" in said
        said = within(name, tmp_path / model, "/dev/null", *options, "--overwrite", code=2).stderr
        assert "/dev/null: is a device" in said
    assert tree(tmp_path) == before
    done = within("report", tmp_path / "packed", "--figures")
    assert done.stdout.startswith("wrote ")
    check_output(tmp_path / "packed", overwrite=True)  # page and pictures are in the list
    (tmp_path / "packed" / "figures" / "mine.png").touch()
    within("report", tmp_path / "packed", "--figures")
    said = within("prune", tmp_path / "dense", tmp_path / "packed", *commands[0][2:], "--overwrite", code=2).stderr
    assert "figures/mine.png in it was not written by this package" in said


def test_a_page_is_not_written_over_the_model(packed_folder):
    before = tree(packed_folder)
    said = within("report", packed_folder, "-o", packed_folder / "model.safetensors", code=2).stderr
    assert "model.safetensors: is a file of the model; name another file with --output" in said
    assert tree(packed_folder) == before


def test_words_of_ones_own_in_the_card_stay(packed_folder, tmp_path):
    out = shutil.copytree(packed_folder, tmp_path / "out")
    (out / "README.md").write_text("# out\n\nMy own words.\n")
    within("export", packed_folder, out, "--overwrite")
    assert "My own words." in (out / "README.md").read_text()
    (out / "README.md").write_bytes("# out\n\nMy own wörds.\n".encode("latin-1"))
    said = within("export", packed_folder, out, "--overwrite", code=2).stderr
    assert "README.md: is no UTF-8 text" in said


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bit_that_is_flipped_in_a_packed_value_is_found(packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "flipped")
    tiny.flip_a_bit(folder / "model.safetensors")
    said = within("inspect", folder, code=2).stderr
    assert said.startswith("error: model.safetensors: digest: its bytes are not those that were saved")


def test_what_is_n_of_m_already_is_packed_without_a_change(packed_folder, text_file, tmp_path):
    within("export", packed_folder, tmp_path / "sparse")
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    shutil.copytree(tmp_path / "sparse", tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()

    printed = within("pack", tmp_path / "bare", tmp_path / "again", "--block-list", "model.layers").stdout
    assert "packed as they are: 14 layers at 2:4" in printed
    assert "left dense: lm_head: matches `ignore`" in printed
    assert "no violation" in within("inspect", tmp_path / "again").stdout
    within("export", tmp_path / "again", tmp_path / "dense")
    again = load_file(tmp_path / "dense" / "model.safetensors")
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)

    report = json.loads(within("pack", tmp_path / "sparse", tmp_path / "out", "--pattern", "2:4", "--json").stdout)
    assert report["summary"]["layers_pruned"] == 14
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    done = within("evaluate", tmp_path / "out", "--text", text_file, "--seq-len", 16, "--num-windows", 2)
    assert "recorded in" in done.stdout

    done = within("pack", tmp_path / "sparse", tmp_path / "no", "--pattern", "1:4", code=2)
    assert "no layer of the 14 looked at is 1:4" in done.stderr
    assert "exists and is not empty" in within("pack", tmp_path / "sparse", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "no").exists()


def damage(folder, change):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("corrupt", "where", "rule"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors",
            "file",
        ),
        (
            lambda f: damage(f, lambda t: t.update({f"{UP}.weight_meta": t[f"{UP}.weight_meta"][:-1].clone()})),
            UP,
            "weight_meta length",
        ),
        (lambda f: damage(f, lambda t: t[f"{UP}.weight_meta"][0, 0].fill_(0xFF)), UP, "pattern"),
        (lambda f: set_config(f, format_version=2), "config.json", "config"),
        (lambda f: damage(f, lambda t: t.pop(f"{UP}.weight_meta")), UP, "missing tensor"),
        (lambda f: set_config(f, min_degree=8), "model.layers.0.self_attn.q_proj", "floor"),
        (lambda f: damage(f, lambda t: t[f"{UP}.weight"][0, 0].fill_(float("inf"))), UP, "values"),
    ],
    ids=["truncated", "meta length", "popcount", "version", "missing", "floor", "inf"],
)
def test_inspect_names_each_corruption(corrupt, where, rule, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "copy")
    corrupt(folder)
    done = within("inspect", folder, "--json", code=2)
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert (where, rule) in [(violation["where"], violation["rule"]) for violation in found["violations"]]
    assert f"error: {where}: {rule}: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["module", "optimum-cli"])
def test_an_error_ends_a_process_with_2_and_without_a_traceback(entry, dense_folder, text_file, tmp_path):
    options = ["prune", dense_folder, tmp_path / "out", "--calibration", text_file, *SMALL, "--pattern", "4:2"]
    done = eggs(*options, entry=entry, code=2)
    assert done.stderr.startswith("error: pattern 4:2: n=4 is the number kept of every m=2")
    assert len(done.stderr.splitlines()) == 1


def test_help_lists_the_subcommands():
    for entry in ("module", "optimum-cli"):
        names = "{prune,pack,quantize,evaluate,inspect,export,benchmark,recover,report,push}"
        assert names in eggs("--help", entry=entry).stdout


def test_an_interrupt_ends_with_130(monkeypatch, capsys, tmp_path):
    from optimum_eggs.cli import main as command

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.inspect, "run", interrupted)
    assert command.main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


@pytest.mark.parametrize(
    ("name", "value"), [("model.embed_tokens.weight", float("nan")), ("model.norm.weight", float("-inf"))]
)
def test_inspect_looks_at_dense_tensors_too(name, value, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "copy")
    damage(folder, lambda t: t[name].view(-1)[-1].fill_(value))
    done = within("inspect", folder, code=2)
    assert f"error: {name}: values: holds NaN or infinite values\n" in done.stderr
    assert "no violation" not in done.stdout


def test_a_report_that_cannot_be_written_costs_nothing(packed_folder, dense_folder, text_file, tmp_path, monkeypatch):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    before = (folder / "report.json").read_text()
    commands = {"evaluate": ["--text", text_file, "--seq-len", 16, "--num-windows", 2], "benchmark": QUICK}

    def read_only(**options):
        raise OSError(30, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr("optimum_eggs.speed.read_bandwidth", lambda: None)  # it takes half a second
    monkeypatch.setattr("optimum_eggs.speed.time_layer", partial(time_layer, working_set=1))
    with monkeypatch.context() as patch:
        patch.setattr("optimum_eggs.engine.report.TemporaryFile", read_only)
        for command, options in commands.items():
            done = within(command, folder, *options)
            assert "MB" in done.stdout
            assert "recorded in" not in done.stdout
            assert done.stderr.startswith("warning: what is measured is not recorded: ")
            assert "Read-only file system" in done.stderr
        assert not within("evaluate", folder, *commands["evaluate"], "--no-record").stderr
    (folder / "report.json.partial").mkdir()  # nothing tells beforehand
    for command, options in commands.items():
        done = within(command, folder, *options, "--json")
        assert json.loads(done.stdout)
        assert "is not recorded: " in done.stderr
    assert (folder / "report.json").read_text() == before


def test_benchmark_looks_at_everything_first(packed_folder, dense_folder, tmp_path, monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("something was timed")

    monkeypatch.setattr("optimum_eggs.speed.read_bandwidth", measured)
    for option, value, needed in (("--prompt", 129, 129), ("--new-tokens", 128, 129)):
        done = within("benchmark", packed_folder, *QUICK, option, value, code=2)
        assert f"({option}) takes {needed} positions, and the context of {packed_folder} has 128; low" in done.stderr
    done = within("benchmark", packed_folder, "--against", tmp_path / "no", *QUICK, code=2)
    assert f"error: --against {tmp_path / 'no'}: there is no such folder" in done.stderr
    other = shutil.copytree(dense_folder, tmp_path / "other")
    (other / "config.json").write_text("{")
    assert "cannot load the model" in within("benchmark", packed_folder, "--against", other, *QUICK, code=2).stderr
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    (folder / "report.json").write_text("[]")
    said = "holds [], no report; save the model again, or move the file away; `inspect` lists all"
    done = within("benchmark", folder, *QUICK, code=2)
    assert done.stderr == f"error: {folder}: report.json: report: {said}\n"  # each is named once
    weights = folder / "model.safetensors"
    weights.rename(folder / "away")
    done = within("benchmark", folder, *QUICK, code=2)
    assert done.stderr.startswith(f"error: {folder}: weights: file: model.safetensors: is missing; ")
    assert done.stderr.count(str(folder)) == done.stderr.count("model.safetensors") == 1
    (folder / "away").rename(weights)
    (folder / "config.json").write_text("{")
    done = within("benchmark", folder, *QUICK, code=2)
    assert done.stderr.startswith(f"error: {folder}: config.json: config: is not valid JSON (")
    assert done.stderr.count("config.json") == done.stderr.count(str(folder)) == 1


QUICK = ["--batch", 1, 3, "--prompt", 8, "--new-tokens", 2, "--repeats", 1, "--layer-repeats", 1]


def test_benchmark_prints_layers_and_models(packed_folder, dense_folder):
    done = within("benchmark", packed_folder, "--against", dense_folder, *QUICK)
    shapes = {(layer.out_features, layer.in_features) for layer in inspect_checkpoint(packed_folder).layers}
    for rows, columns in shapes:
        assert done.stdout.count(f" {rows} x {columns} ") == 2  # one line for each number of tokens
    for label in ("prefill of 8, tokens/s", "decode of 2, tokens/s", "memory grown by, MB", "weights, MB"):
        assert label in done.stdout
    for label in ("a step of decoding, ms", "  linear layers in blocks", "  output head", "  all else"):
        assert label in done.stdout
    assert ("share of its bytes' limit" in done.stdout) == bool(INSTRUCTION_SETS)


@pytest.mark.slow
def test_benchmark_in_json(packed_folder):
    found = json.loads(within("benchmark", packed_folder, *QUICK, "--json").stdout)
    assert {row["tokens"] for row in found["layers"]} == {1, 3}
    assert sum(row["layers"] for row in found["layers"] if row["tokens"] == 1) == 14
    assert len(found["models"]) == 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    layers_alone = json.loads(within("benchmark", packed_folder, *QUICK, "--layers-only", "--json").stdout)
    assert layers_alone["models"] == []


def test_benchmark_times_sequences_and_compiled_generation(packed_folder, monkeypatch):
    compiled = []
    monkeypatch.setattr("optimum_eggs.speed.models.compile_generation", compiled.append)
    found = json.loads(within("benchmark", packed_folder, *QUICK, "--sequences", 2, "--compile", "--json").stdout)
    assert (found["models"][0]["sequences"], found["models"][0]["compiled"]) == (2, True)
    assert len(compiled) == 1


def test_benchmark_compiles_on_the_cpu_alone(packed_folder, monkeypatch):
    monkeypatch.setattr("optimum_eggs.cli.benchmark.chosen_device", lambda args: torch.device("meta"))
    assert "--compile is for the CPU" in within("benchmark", packed_folder, *QUICK, "--compile", code=2).stderr


def test_benchmark_names_the_accelerator_and_reads_no_memory_of_the_host(packed_folder, monkeypatch):
    from optimum_eggs.speed import time_layer

    def on_the_cpu(*arguments, device, **options):
        assert device == torch.device("meta")
        return time_layer(*arguments, **options)

    monkeypatch.setattr("optimum_eggs.cli.benchmark.chosen_device", lambda args: torch.device("meta"))
    monkeypatch.setattr("optimum_eggs.speed.read_bandwidth", None)
    monkeypatch.setattr("optimum_eggs.speed.time_layer", on_the_cpu)
    options = ["benchmark", packed_folder, *QUICK, "--layers-only"]
    assert within(*options).stdout.startswith("meta\n")
    machine = json.loads(within(*options, "--json").stdout)["machine"]
    assert (machine["accelerator"], machine["read_bandwidth"]) == ("meta", None)


def test_benchmark_refuses_a_dense_model(dense_folder):
    assert "error: " in within("benchmark", dense_folder, *QUICK, code=2).stderr


@pytest.mark.slow
def test_what_was_measured_is_put_into_the_report(packed_folder, dense_folder, text_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed_folder, folder)
    report = json.loads((folder / "report.json").read_text())
    for key in ("evaluations", "benchmark"):  # other tests measure the folder
        report.pop(key, None)
    (folder / "report.json").write_text(json.dumps(report))
    options = ["evaluate", folder, "--text", text_file, "--seq-len", 16, "--num-windows"]
    within(*options, 2, "--no-record")
    before = json.loads((folder / "report.json").read_text())
    printed = within(*options, 2, "--against", dense_folder).stdout
    assert "recorded in" in printed
    within(*options, 3)
    found = json.loads(within(*options, 2, "--against", dense_folder, "--json").stdout)  # again: replaced, not added
    report = json.loads((folder / "report.json").read_text())
    assert {key: value for key, value in report.items() if key != "evaluations"} == {
        key: value for key, value in before.items() if key != "evaluations"
    }
    new = report["evaluations"]
    assert [entry["conditions"] for entry in new] == [f"{n} windows of 16 tokens, float32" for n in (3, 2)]
    assert new[1]["metrics"]["perplexity"] == found["model"]["perplexity"]["perplexity"]
    assert new[1]["dense"]["perplexity"] == found["against"]["perplexity"]["perplexity"]
    assert new[1]["dataset"] == text_file.name
    for other, known in ((packed_folder, 1), (dense_folder, 2)):  # only a dense model is recorded as the dense one
        within("benchmark", folder, "--against", other, *QUICK)
        speed = json.loads((folder / "report.json").read_text())["benchmark"]
        assert [model["packed"] for model in speed["models"]] == [True, False][:known]
    within("benchmark", folder, *QUICK)
    speed = json.loads((folder / "report.json").read_text())["benchmark"]
    within("benchmark", folder, *QUICK, "--sequences", 2)
    assert json.loads((folder / "report.json").read_text())["benchmark"] == speed  # that of one sequence
    assert "folder" not in speed["models"][0]
    assert (speed["prompt"], speed["new_tokens"], speed["dtype"]) == (8, 2, "float32")
    assert speed["machine"]["accelerator"] is None
    assert str(tmp_path) not in (folder / "report.json").read_text()
