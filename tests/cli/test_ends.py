"""How a command ends where something is in its way: in one line, and with the code that says what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from optimum_eggs import folders
from optimum_eggs.cli import main as command
from optimum_eggs.errors import OutOfMemoryError
from optimum_eggs.memory import enough_memory


def typed(error):
    """What a function of this package makes of another library's error."""
    with pytest.raises(OutOfMemoryError) as found, enough_memory("batch_size"):
        raise error
    return found.value


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried\n"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        typed(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    ],
    ids=["python", "torch", "gpu", "typed"],
)
@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["prune", "model", "out"], "--batch-size or --seq-len or --num-samples or --memory-budget"),
        (["inspect", "model"], "use a machine that has more"),
    ],
)
def test_memory_that_cannot_be_had_ends_with_1_and_what_to_reduce(
    failure, arguments, remedy, monkeypatch, capsys, tmp_path
):
    arguments = [str(tmp_path) if part == "model" else part for part in arguments]

    def fails(args):
        raise failure

    monkeypatch.setattr(getattr(command, arguments[0]), "run", fails)
    assert command.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory (")
    assert remedy in line
    assert line.endswith(", or --device cpu") == ("CUDA" in line and arguments[0] == "prune")


def test_another_error_of_torch_is_not_taken_for_it(monkeypatch, tmp_path):
    def fails(args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(command.inspect, "run", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        command.main(["inspect", str(tmp_path)])


def test_an_interrupt_while_libraries_are_imported_ends_with_130(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise KeyboardInterrupt")  # the first that a command imports
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[:] = ['eggs', 'inspect', '.']; "
    code += "import runpy; runpy.run_module('optimum_eggs', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")


def test_an_interrupt_while_torch_is_imported_waits_for_its_end(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, sys, time\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(0.1)\n"
        "print('imported', file=sys.stderr)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[:] = ['eggs', 'inspect', '.']; "
    code += "import runpy; runpy.run_module('optimum_eggs', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "imported\ninterrupted; nothing was written\n")


@pytest.mark.parametrize("when", ["within", "after"])
def test_an_interrupt_when_the_output_is_in_place_says_that(when, packed_folder, tmp_path, monkeypatch, capsys):
    exchange, run = folders._exchange, command.export.run

    def interrupt(*_):
        raise KeyboardInterrupt

    if when == "within":
        monkeypatch.setattr(
            folders, "_exchange", lambda *paths: (exchange(*paths), os.kill(os.getpid(), signal.SIGINT))
        )
    else:
        monkeypatch.setattr(command.export, "run", lambda args: (run(args), interrupt()))
    assert command.main(["export", str(packed_folder), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; {tmp_path / 'out'} is whole and in place"
    monkeypatch.setattr(command.export, "run", interrupt)  # and of what was there before, nothing
    assert command.main(["export", str(packed_folder), str(tmp_path / "other")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_an_interrupted_recovery_says_how_to_go_on(packed_folder, text_file, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_eggs.recovery.recover.recover", interrupted)
    assert command.main(["recover", str(packed_folder), str(tmp_path / "out"), "--train", str(text_file)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize("name", ["evaluate", "push"])
def test_nothing_is_claimed_of_what_is_written_elsewhere(name, packed_folder, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(command, name), "run", interrupted)
    assert command.main([name, str(packed_folder), *(["me/model"] if name == "push" else [])]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_while_the_command_itself_is_imported_too(tmp_path):
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    code += "runpy.run_module('optimum_eggs', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_python_without_docstrings_has_every_command():
    code = """
import sys
from optimum_eggs.cli import main
sys.exit("docstrings are there") if main.__doc__ else None
commands = main.build_parser()._subparsers._group_actions[0].choices
print("".join(parser.format_help() for parser in commands.values()))
"""
    done = subprocess.run([sys.executable, "-OO", "-B", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "model", "--text", "./no.txt"], "text='./no.txt' (--text): there is no such file"),
        (["recover", "model", "out", "--train", "./no.txt"], "train='./no.txt' (--train): there is no such file"),
        (["evaluate", "model", "--text", "sample", "--seq-len", "500"], "seq_len=500 (--seq-len) is more than"),
    ],
)
def test_a_value_that_is_refused_is_named_with_its_option(arguments, message, packed_folder, tmp_path, capsys):
    folders = {"model": str(packed_folder), "out": str(tmp_path / "out")}
    assert command.main([folders.get(part, part) for part in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
