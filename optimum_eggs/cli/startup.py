"""`python -m optimum_eggs autoload` and `python -m optimum_eggs run`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from .. import autoload
from ..errors import ConfigError, EGGSError, first_line
from .printing import say

HELP = {
    "autoload": "on, off, status: whether every Python of this environment knows packed models, without an import",
    "run": "COMMAND ...: run a command that knows packed models, and so do the Pythons that it starts",
}


def main(arguments: Sequence[str], prog: str = "python -m optimum_eggs") -> int:
    """Run one of the two. Returns the exit code, that of the command for `run`; 2 for bad input."""
    parser = argparse.ArgumentParser(prog=f"{prog} {arguments[0]}", description=HELP[arguments[0]])
    if arguments[0] == "run":
        parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    else:
        parser.add_argument("state", choices=["on", "off", "status"])
    args = parser.parse_args(arguments[1:])
    try:
        return _run(args.command) if arguments[0] == "run" else _switch(args.state)
    except EGGSError as error:
        say(f"error: {error}")
        return 2


def _switch(state: str) -> int:
    if state == "on":
        autoload.switch_on()
    elif state == "off":
        autoload.switch_off()
    where = autoload.place()
    if autoload.is_on():
        print(f"on: {where} has every Python of this environment import optimum_eggs with transformers")
    elif where.exists():
        print(f"on, but of another version or place of the package: {where}; `autoload on` renews it")
    else:
        print(f"off: {where} is not there")
    return 0


def _run(command: Sequence[str]) -> int:
    command = command[1:] if command[:1] == ["--"] else command
    program = shutil.which(command[0]) if command else None
    if program is None:
        named = f"the command {command[0]!r} is not found" if command else "no command is given"
        raise ConfigError(f"{named}; name a program, as in: python -m optimum_eggs run lm_eval --model hf ...")
    environment = autoload.with_hook(os.environ)
    try:
        if os.name == "posix":  # in place of this process, so that signals and the exit code are the command's
            sys.stdout.flush()
            os.execve(program, list(command), environment)
        return subprocess.run([program, *command[1:]], env=environment, check=False).returncode
    except OSError as error:
        raise ConfigError(f"{program} cannot be run ({first_line(error)}); name a program") from error
