"""Where stdout is ASCII, closed, or read by nobody, a command's work is done all the same."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from optimum_eggs.cli.main import main
from optimum_eggs.inspection import Inspection

QUICK = ["--batch", "1", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--layer-repeats", "1"]


@pytest.fixture
def folder(packed_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_eggs.speed.read_bandwidth", lambda: None)  # it takes half a second
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({key: report[key] for key in report if key != "benchmark"}))
    return folder


def benchmarked(folder):
    return "benchmark" in json.loads((folder / "report.json").read_text())


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that nobody reads, as stdout is in `eggs ... | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="utf-8", buffering=1)  # noqa: PTH123, SIM115 - a descriptor
    yield stream
    stream.close()


def test_ascii_has_escapes_for_what_it_lacks(folder, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["benchmark", str(folder), *QUICK]) == 0
    assert rb" \xb5s " in written.getvalue()
    assert benchmarked(folder)


def test_a_pipe_that_nobody_reads_costs_nothing(folder, closed_pipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(["benchmark", str(folder), *QUICK]) == 0
    assert benchmarked(folder)
    closed_pipe.write("and what Python writes at the end")
    closed_pipe.flush()


def test_the_exit_code_and_stderr_are_as_ever(folder, closed_pipe, monkeypatch, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(["inspect", str(folder)]) == 2
    assert "error: model.norm.weight: values" in capsys.readouterr().err


def test_a_closed_stdout_costs_nothing(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it then
    assert main(["inspect", str(folder)]) == 0


def printing(result):
    """A function that prints, as libraries do, and returns `result`."""

    def called(*arguments, **options):
        print("a note of a library")
        return result

    return called


@pytest.mark.parametrize(
    ("command", "replaced", "result"),
    [
        (["inspect", "{}"], "optimum_eggs.inspection.inspect_checkpoint", Inspection("a")),
        (["report", "{}"], "optimum_eggs.report.report_page", "<html>"),
        (
            ["push", "{}", "me/tiny"],
            "optimum_eggs.sharing.push_folder",
            SimpleNamespace(oid="1", commit_url="2", pr_url=None),
        ),
    ],
    ids=["inspect", "report", "push"],
)
def test_what_libraries_print_goes_to_stderr(command, replaced, result, folder, monkeypatch, capsys):
    monkeypatch.setattr(replaced, printing(result))
    assert main([word.format(folder) for word in command] + ["--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "a note of a library" in printed.err


def test_what_was_printed_before_an_error_is_written(folder, monkeypatch, capsys):
    from optimum_eggs.cli import main as command
    from optimum_eggs.errors import ModelError

    def run(args):
        print("first")
        raise ModelError("then")

    monkeypatch.setattr(command.inspect, "run", run)
    assert main(["inspect", str(folder)]) == 2
    assert capsys.readouterr() == ("first\n", "error: then\n")


def test_a_stdout_that_cannot_be_written_is_an_error_in_one_line(folder, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", str(folder), "--json"]) == 2
        full.flush()  # as Python does when it exits
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: standard output cannot be written (")
    assert "No space left on device" in line


@pytest.mark.parametrize("option", ["--against", "--text"])  # refused at once; after work has begun
def test_a_stderr_that_nobody_reads_costs_nothing(option, folder, closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert main(["evaluate", str(folder), option, str(folder / "none.txt")]) == 2
    closed_pipe.write("and what Python writes at the end")
    closed_pipe.flush()


def test_a_closed_stderr_puts_no_errors_on_stdout(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(folder / "none")]) == 2
    assert capsys.readouterr().out == ""
    assert main(["inspect", str(folder)]) == 0
