"""What keeps a file or a folder from being read, in words: a permission, what it is, or its name.

`closed`, `no_file` and `no_utf8` give the end of a message, which the path goes before, or None if there is nothing to
say. None of these functions raises for any path, one that can be none too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}


def is_there(path: str | Path) -> bool:
    """Whether there is a file or a folder; one that may not be looked at, for all that is known, is there."""
    try:
        Path(path).stat()
    except PermissionError:
        return True
    except (OSError, ValueError):  # the latter for a name that can be none
        return False
    return True


def kind(path: Path) -> str | None:
    """What is at a path: `"file"`, `"folder"`, `"pipe"`, `"socket"`, `"device"`, or `"link"` for one to nothing.

    None where nothing is, and where it may not be looked at, which [`is_there`] and [`closed`] tell apart.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return None
    except (OSError, ValueError):
        return "link" if os.path.islink(path) else None  # noqa: PTH114 - Path.is_symlink raises for a long name
    return next((name for name, holds in _KINDS.items() if holds(mode)), "device")


def absolute(path: Path) -> Path:
    """The path from the root on, links not followed, which takes a permission; as it is in a folder that is gone."""
    try:
        return path.absolute()
    except OSError:
        return path


def closed(path: Path) -> str | None:
    """Which permission is missing to read a file or a folder that is there, or to come to it, and who can give it."""
    if not is_there(path):
        return None
    if os.access(path, os.R_OK) and os.access(path, os.X_OK if path.is_dir() else os.R_OK):
        return None
    whole = absolute(path)
    for each in (*reversed(whole.parents), whole):
        try:
            found = each.stat()
        except PermissionError:  # it is a link into a closed folder
            real = each.resolve()
            why = None if real == each else closed(real)
            return why and f"{'' if each == whole else f'{each} '}is a link to {real}: {why}"
        except OSError:  # it has gone meanwhile
            return None
        folder = stat.S_ISDIR(found.st_mode)
        if not os.access(each, (os.X_OK if folder else 0) | (os.R_OK if each == whole else 0)):
            owner, may = _owner(each, found.st_uid), "r" if not folder else "rx" if each == whole else "x"
            remedy = f"allow it with `chmod u+{may}`" if found.st_uid == _user() else f"have {owner} allow it"
            what = "may not be read" if each == whole else f"{each} may not be entered"
            return f"{what} (its permissions are {stat.filemode(found.st_mode)}, its owner is {owner}); {remedy}"
    return None


def no_file(path: Path) -> str | None:
    """What is at a path in place of a file that can be read; where there is nothing at all, None too."""
    why, what = closed(path), kind(path)
    if why or what in ("file", None):
        return why
    if what == "link":
        return f"is a link to {path.readlink()}, which is not there; put the file there, or in the link's place"
    return f"is a {what}, where a file must be; put the file there"


def no_utf8(path: str | Path) -> str | None:
    """That a path has bytes in it that are no UTF-8: safetensors and tokenizers open none, no report names it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "the path is not UTF-8, as safetensors, tokenizers and reports need it; rename what is not"
    return None


def _owner(path: Path, number: int) -> str:
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):  # no name for this user id, as in containers, or for any
        return str(number)


def _user() -> int:
    """The number of the user that this process acts for; -1 on systems whose users have none."""
    return getattr(os, "geteuid", lambda: -1)()
