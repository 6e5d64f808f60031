"""Packed models in programs that do not import this package: for an environment, or for one command.

A line in the environment's site-packages, or a folder in PYTHONPATH, has Python run a hook at its start, which imports
this package when transformers is imported. Installing the package does neither.
"""

from __future__ import annotations

import os
import site
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from .errors import OutputError, first_line

STARTUP = Path(__file__).resolve().parent / "startup"
NAME = "optimum_eggs_autoload.pth"


def line(hook: Path = STARTUP / "hook.py") -> str:
    """What Python runs at its start: nothing, once the package is gone."""
    run = f"with open(path, encoding='utf-8') as f: exec(compile(f.read(), path, 'exec'), {{'__name__': '{NAME}'}})"
    return f"import os; path = {str(hook)!r}; os.path.isfile(path) and exec({run!r})\n"


def place() -> Path:
    """The file that the line is in: in the site-packages of this environment, or of the user where the package is."""
    user = site.getusersitepackages() if site.ENABLE_USER_SITE else None
    if user and STARTUP.is_relative_to(Path(user).resolve()):
        return Path(user) / NAME
    return Path(sysconfig.get_path("purelib")) / NAME


def is_on() -> bool:
    """Whether the file has the line, as it is of this package where it is now."""
    try:
        return place().read_text(encoding="utf-8") == line()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    except OSError as error:
        raise OutputError(f"{place()} cannot be read ({first_line(error)})") from error


def switch_on() -> None:
    """Write the line.

    Raises:
        OutputError: the file cannot be written.
    """
    made = place().with_suffix(f".{os.getpid()}.tmp")
    try:
        made.write_text(line(), encoding="utf-8")
        made.replace(place())
    except OSError as error:
        made.unlink(missing_ok=True)
        raise OutputError(
            f"{place()} cannot be written ({first_line(error)}); use an environment of your own (python -m venv), or "
            "`python -m optimum_eggs run COMMAND`, which writes nothing"
        ) from error


def switch_off() -> None:
    """Remove the line's file, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        place().unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{place()} cannot be removed ({first_line(error)})") from error


def with_hook(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables with which Python, and every Python that it starts, runs the hook.

    >>> with_hook({"PYTHONPATH": "here"})["PYTHONPATH"].split(os.pathsep)[1]
    'here'
    """
    before = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(STARTUP), *([before] if before else [])])}
