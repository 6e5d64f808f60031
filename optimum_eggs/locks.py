"""One process at a time in a folder."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

LOCK_NAME, OWNER_NAME = "lock", "owner.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while within.

    Raises:
        OutputError: another process is at work in it.
    """
    from filelock import FileLock, Timeout  # whose import takes longer than all of `--help`

    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{folder}: {_owner(folder)} is writing to it; wait for it, or name another output") from None
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": time.time()}
        (folder / OWNER_NAME).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        (folder / OWNER_NAME).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_NAME).read_text(encoding="utf-8"))
        minutes = (time.time() - owner["since"]) / 60
        return f"process {owner['pid']} of {owner['user']} on {owner['host']}, begun {minutes:.0f} minutes ago,"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        return "another process"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in containers
        return str(os.getuid())
