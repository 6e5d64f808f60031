"""Folders and files that a user has no right to read: each command that needs them ends in one line, and says why."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from optimum_eggs.cli.main import main
from optimum_eggs.errors import ModelError
from optimum_eggs.hf.loading import load_config, load_model, load_tokenizer

SMALL = ["--num-samples", "8", "--seq-len", "16", "--set", "band=8"]
SHORT = ["--seq-len", "16", "--num-windows", "2"]
ENDS = f"""
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from unprivileged import become_ordinary
from optimum_eggs.cli.main import main
become_ordinary()
ends = {{}}
for name, arguments in json.loads(sys.argv[1]).items():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        ends[name] = [main(arguments), said.getvalue()]
print(json.dumps(ends))
"""

LOADS = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from unprivileged import become_ordinary
from optimum_eggs.files import likeness
from optimum_eggs.hf.loading import load_config, load_model
from optimum_eggs.speed.models import check_models
become_ordinary()
print(likeness({{model!r}})["model-old.safetensors"])
print(type(load_config({{config!r}})).__name__, type(load_model({{model!r}})).__name__)
Path({{shard!r}}).chmod(0)
for folder in ({{model!r}}, {{part!r}}):
    for act in (load_model, lambda folder: check_models([folder], 1, 1)):
        try:
            act(folder)
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.fixture
def models(packed_folder, dense_folder, tmp_path):
    """Copies of a packed and of a dense model, each in a folder of its own."""
    found = {"packed": packed_folder, "dense": dense_folder}
    copies = {name: shutil.copytree(folder, tmp_path / name / "model") for name, folder in found.items()}
    yield copies
    for folder in copies.values():
        folder.parent.chmod(0o700)
        if folder.exists():
            folder.chmod(0o700)


@pytest.fixture
def commands(models, packed_folder, dense_folder, text_file, tmp_path):
    """A command of every kind on the copies."""
    packed, dense, out = models["packed"], models["dense"], tmp_path / "out"
    train = ["--train", text_file, "--seq-len", "16"]
    return {
        "inspect": ["inspect", packed],
        "evaluate": ["evaluate", packed, "--text", text_file, *SHORT],
        "evaluate against": ["evaluate", packed_folder, "--against", dense, "--text", text_file, *SHORT, "--no-record"],
        "prune": ["prune", dense, out, "--calibration", text_file, *SMALL],
        "pack": ["pack", dense, out],
        "export": ["export", packed, out],
        "recover": ["recover", packed, out, *train],
        "recover from a teacher": ["recover", packed_folder, out, *train, "--teacher", dense],
        "benchmark": ["benchmark", packed, "--prompt", "4", "--new-tokens", "2", "--repeats", "1", "--batch", "1"],
        "report": ["report", packed],
        "push": ["push", packed, "me/model"],
    }


NOT_READ_BY = {
    "config.json": {"report"},
    "model.safetensors": set(),
    "tokenizer.json": {"inspect", "benchmark", "report"},
    "report.json": {"evaluate against", "prune", "pack", "export", "recover from a teacher"},
}
"""Files of a model, and the commands that do without them."""


@pytest.mark.usefixtures("unprivileged")
@pytest.mark.parametrize("closed", [".", "..", *NOT_READ_BY])
def test_what_may_not_be_read_is_named_with_its_permissions(closed, commands, models, forks, tmp_path):
    for folder in models.values():
        if (folder / closed).exists():
            (folder / closed).chmod(0)
    asked = {
        name: [str(part) for part in command]
        for name, command in commands.items()
        if name not in NOT_READ_BY.get(closed, ())
    }
    done = forks.run("-c", ENDS, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    for name, (code, said) in json.loads(done.stdout).items():
        assert code == 2, (name, said)
        (line,) = said.splitlines()
        folder = models["packed" if models["packed"] in commands[name] else "dense"]
        at = os.path.normpath(folder / closed)
        what = f"{re.escape(at)} may not be entered" if closed == ".." else f"{re.escape(at)}: may not be read"
        if closed in NOT_READ_BY:  # `inspect` names the file in its folder, and the rule
            what = rf"{closed}: (\w+: )?may not be read"
        assert line.startswith("error: "), name
        assert str(folder) in line or name == "inspect", name
        assert re.search(rf"{what} \(its permissions are {'-' if closed in NOT_READ_BY else 'd'}------", line), line
        assert "; allow it with `chmod u+" in line
    assert not (tmp_path / "out").exists()


def end(*arguments, encoding="utf-8"):
    """Code, stdout and the last line of stderr of a command whose streams have an encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = main([os.fsdecode(argument) for argument in arguments])
        printed = []
        for stream in (out, err):
            stream.flush()
            printed.append(stream.buffer.getvalue().decode(encoding))
    return code, *printed


@pytest.fixture
def odd(tmp_path):
    """A folder in one whose name is of bytes that are no UTF-8."""
    folder = tmp_path / os.fsdecode(b"o\xff")
    folder.mkdir()
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_folder_whose_name_is_no_utf8_is_refused_at_once(encoding, odd, models, commands):
    for folder in models.values():
        folder.rename(odd / folder.parent.name)
    moved = {str(folder): odd / folder.parent.name for folder in models.values()}
    for name, command in commands.items():
        code, out, said = end(*(moved.get(str(part), part) for part in command), encoding=encoding)
        assert (code, out, len(said.splitlines())) == (2, "", 1), (name, said)
        assert "o\\udcff/" in said
        assert ": the path is not UTF-8, as safetensors, tokenizers and reports need it; rename what is not\n" in said


def test_neither_is_one_by_the_folder_that_one_is_in(odd, packed_folder, monkeypatch):
    monkeypatch.chdir(shutil.copytree(packed_folder, odd / "model"))
    code, out, said = end("report", ".")
    assert (code, out) == (2, "")
    assert said.startswith("error: .: the path is not UTF-8")
    shutil.rmtree(odd)  # and a folder that is gone has no path
    assert end("inspect", ".")[0] == 2


@pytest.mark.parametrize("name", ["prune", "pack", "export", "recover"])
def test_neither_may_an_output_have_such_a_name(name, odd, commands):
    code, out, said = end(*commands[name][:2], odd / "out", *commands[name][3:])
    assert (code, out, len(said.splitlines())) == (2, "", 1), said
    assert f"{odd.parent}/o\\udcff/out: the path is not UTF-8" in said
    assert said.endswith("; rename what is not, or name another folder\n")
    assert list(odd.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "option"), [("evaluate", "--text"), ("prune", "--calibration"), ("recover", "--train")]
)
def test_neither_may_a_text_have_such_a_name(name, option, odd, commands, text_file):
    shutil.copy(text_file, odd / "text.txt")
    command = [odd / "text.txt" if part == text_file else part for part in commands[name]]
    code, _, said = end(*command)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert f"o\\udcff/text.txt' ({option}): the path is not UTF-8" in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_page_may(encoding, odd, models):
    code, out, _ = end("report", models["packed"], "-o", odd / "page.html", encoding=encoding)
    assert code == 0
    assert out == f"wrote {odd.parent}/o\\udcff/page.html\n"
    assert (odd / "page.html").is_file()


def test_a_gguf_file_that_is_not_there_is_named_with_its_option(dense_folder, text_file, tmp_path):
    command = ["prune", dense_folder, tmp_path / "out", "--calibration", text_file, "--gguf-file", "foo"]
    code, _, said = end(*command)
    assert code == 2
    assert said == (
        f"error: gguf_file='foo' (--gguf-file): there is no such file in {dense_folder}, which holds no GGUF file; "
        "leave gguf_file out to load its safetensors\n"
    )
    folder = shutil.copytree(dense_folder, tmp_path / "model")
    (folder / "bar.gguf").touch()
    _, _, said = end("prune", folder, *command[2:])
    assert f"there is no such file in {folder}; name one of ['bar.gguf']\n" in said
    (folder / "foo").mkdir()
    assert "gguf_file='foo' (--gguf-file): is a folder" in end("prune", folder, *command[2:])[2]
    (folder / "bar.gguf").unlink()
    for name in ("x" * 300, "a\0b"):
        _, _, said = end("prune", folder, *command[2:-1], name)
        assert f"gguf_file={name!r} (--gguf-file): there is no such file in {folder}, which holds no" in said


@pytest.mark.parametrize("name", ["a\0b.gguf", "y" * 300 + ".gguf", "./" + "y" * 300])
def test_a_model_whose_name_can_be_none_is_not_there(name):
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r": (there is no such f|cannot load the )"):
            load(name)
    code, _, said = end("inspect", name)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert ": there is no such f" in said


@pytest.mark.usefixtures("unprivileged")
def test_weights_that_a_model_is_not_loaded_from_may_be_closed(dense_folder, forks, tmp_path):
    one, many = (shutil.copytree(dense_folder, tmp_path / name) for name in ("one", "many"))
    (one / "model.safetensors").chmod(0)
    (many / "model.safetensors").unlink()
    load_model(dense_folder).save_pretrained(many, max_shard_size="20KB")
    (many / "model-old.safetensors").touch(0)
    shard = min(many.glob("model-0*.safetensors"))
    script = LOADS.format(config=str(one), model=str(many), shard=str(shard), part=str(one))
    said = forks.run("-c", script, check=True).stdout.splitlines()
    assert said[:2] == ["[0, None]", "LlamaConfig LlamaForCausalLM"]
    files = (shard, one / "model.safetensors")
    expected = [f"{error} {file}: may not be read" for file in files for error in ("ModelError", "CheckpointError")]
    for line, start in zip(said[2:], expected, strict=True):
        assert line.startswith(f"{start} (its permissions are ----------, its owner is ")


@pytest.mark.usefixtures("unprivileged")
def test_a_card_that_may_not_be_read_is_not_written_over(packed_folder, forks, tmp_path):
    out = shutil.copytree(packed_folder, tmp_path / "out")
    (out / "README.md").chmod(0)
    asked = {"export": ["export", str(packed_folder), str(out), "--overwrite"]}
    done = forks.run("-c", ENDS, json.dumps(asked))
    code, said = json.loads(done.stdout)["export"]
    assert code == 2
    assert said.startswith(f"error: {out / 'README.md'}: may not be read (its permissions are ---------")
    assert said.endswith("; allow it with `chmod u+r`\n")
