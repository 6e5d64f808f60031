"""A folder that is not there is called one, at once, and nobody is asked for it."""

from __future__ import annotations

import socket

import pytest

from optimum_eggs.cli.main import main
from optimum_eggs.errors import ModelError
from optimum_eggs.hf.loading import load_model, load_tokenizer

COMMANDS = {
    "push": ["{}", "me/tiny"],
    "inspect": ["{}"],
    "evaluate": ["{}", "--text", "text.txt"],
    "benchmark": ["{}"],
    "recover": ["{}", "out", "--train", "text.txt"],
    "export": ["{}", "out"],
    "pack": ["{}", "out"],
    "report": ["{}"],
    "prune": ["{}", "out", "--calibration", "sample"],
}


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """In an empty folder, without a network."""

    def asked(*arguments):
        raise AssertionError("a request was sent")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, command, *arguments):
    assert main([command, *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "no/such/folder", "/no/such", "nosuch/", ""])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_there_is_called_one(command, name, alone, capsys):
    if command == "prune" and name == "nosuch":
        pytest.skip("it may be the name of a model on the Hub, such as gpt2")
    line = refused(capsys, command, *(part.format(name) for part in COMMANDS[command]))
    shown = name or "''"
    assert line == f"error: {shown}: there is no such folder; check the path"
    assert not list(alone.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_is_no_folder(command, alone, capsys):
    (alone / "model.safetensors").touch()
    line = refused(capsys, command, *(part.format("model.safetensors") for part in COMMANDS[command]))
    assert line == "error: model.safetensors: is a file; name the folder of a saved model"


@pytest.mark.parametrize(
    ("command", "option"), [("evaluate", "--against"), ("benchmark", "--against"), ("recover", "--teacher")]
)
def test_the_other_model_is_named_with_its_option(command, option, alone, packed_folder, capsys):
    arguments = [part.format(packed_folder) for part in COMMANDS[command]]
    line = refused(capsys, command, *arguments, option, "./nosuch")
    assert line == f"error: {option} ./nosuch: there is no such folder; check the path"


def test_a_gguf_file_that_is_not_there_is_called_a_file(alone, capsys):
    line = refused(capsys, "prune", "nosuch.gguf", "out", "--calibration", "sample")
    assert line == "error: nosuch.gguf: there is no such file; check the path"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["./nosuch", "a/b/c", "nosuch/"])
def test_the_same_in_python(load, name, alone):
    with pytest.raises(ModelError, match=rf"^{name}: there is no such folder; check the path"):
        load(name)
