"""Help comes without torch and transformers, whose import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from optimum_eggs.cli.main import build_parser

HEAVY = {"torch", "transformers", "datasets", "accelerate", "scipy", "numpy", "huggingface_hub", "safetensors"}
MODULE = "import runpy, sys; sys.argv[:] = ['optimum_eggs', *{}]; runpy.run_module('optimum_eggs', run_name='__main__')"
OPTIMUM_CLI = "import sys; sys.argv[:] = ['_', 'eggs', *{}]; import optimum.commands.optimum_cli as c; c.main()"
REPORT = """
import atexit, json, sys
@atexit.register
def loaded():
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


def subcommands():
    (action,) = [action for action in build_parser()._actions if action.dest == "subcommand"]
    return list(action.choices)


def run(start, arguments, code=0):
    """What the command prints, and the packages that were imported for it."""
    done = subprocess.run([sys.executable, "-c", REPORT + start.format(arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    *_, last = done.stderr.splitlines()
    return done, set(json.loads(last))


@pytest.mark.parametrize("start", [MODULE, OPTIMUM_CLI], ids=["module", "optimum-cli"])
@pytest.mark.parametrize("subcommand", [None, *subcommands()])
def test_help_imports_nothing_heavy(start, subcommand):
    done, loaded = run(start, [*([subcommand] if subcommand else []), "--help"])
    assert "usage: " in done.stdout
    assert f"eggs {subcommand or '[-h]'}" in done.stdout.replace("optimum_eggs", "optimum-eggs")
    assert not HEAVY & loaded


@pytest.mark.parametrize("command", ["inspect nosuch", "push nosuch me/tiny", "prune ./nosuch out"])
def test_a_folder_that_is_not_there_is_refused_without_them_too(command):
    done, loaded = run(MODULE, command.split(), code=2)
    assert "there is no such folder; check the path" in done.stderr
    assert not HEAVY & loaded


def test_a_wrong_option_is_refused_without_them_too():
    done, loaded = run(MODULE, ["prune", "model", "out", "--no-such-flag"], code=2)
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert not HEAVY & loaded
