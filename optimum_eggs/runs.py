"""What unfinished runs have left beside an output: each has a folder of its own, so that none is in another's way."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from .errors import shorten
from .files import write_durably

logger = logging.getLogger(__name__)

_RUN = "run.json"
_DIGESTS = {"calibration": "calibration text", "windows": "training text"}
"""Keys of a run that hold the digest of its tokens, and of what."""


def run_folder(work: Path, run: dict[str, Any]) -> Path:
    """Where a run leaves what is finished, in the hidden folder beside its output."""
    text = json.dumps(run, sort_keys=True)
    return work / f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def open_run(work: Path, run: dict[str, Any], overwrite: bool) -> Path:
    """The folder of a run: that of the same run that was cut, or a new one.

    What other runs have left is removed with `overwrite`; else it stays, and a warning says what is different.

    Args:
        work: Hidden folder beside the output, locked.
        run: What decides the result, as JSON types.
        overwrite: Whether other runs are to be gone on with no more.
    """
    run = json.loads(json.dumps(run))
    folder = run_folder(work, run)
    others = [other for other in sorted(work.glob("run-*")) if other != folder]
    if overwrite:
        for other in others:
            shutil.rmtree(other, ignore_errors=True)
    elif others and not folder.is_dir():
        latest = max(others, key=lambda other: other.stat().st_mtime)
        logger.warning(
            "%s: another run was cut there (%s); this one starts from the beginning. The options of before go "
            "on with that one, until a run ends, which removes it",
            work,
            difference(_read(latest), run),
        )
    folder.mkdir(exist_ok=True)
    write_durably(folder / _RUN, json.dumps(run, indent=1))
    return folder


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that two runs differ in, in words.

    >>> difference({"config": {"n": 2}}, {"config": {"n": 1}})
    'config.n was 2 and is now 1'
    >>> difference({"model": {"config.json": "3f"}}, {"model": {"config.json": "a0"}})
    "the model's file config.json changed since"
    >>> difference({}, {"model": {}})
    'its settings cannot be read'
    """
    if not before:
        return "its settings cannot be read"
    key = next(key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key))
    was, is_now, part = before.get(key), now.get(key), None
    if isinstance(was, dict) and isinstance(is_now, dict):
        part = next(k for k in sorted(was.keys() | is_now.keys()) if was.get(k) != is_now.get(k))
        was, is_now = was.get(part), is_now.get(part)
    if key == "model" and part is not None:
        how = "is not there any more" if is_now is None else "is new" if was is None else "changed since"
        return f"the model's file {part} {how}"
    if key in _DIGESTS:
        return f"the {_DIGESTS[key]} gives other tokens"
    name = key if part is None else f"{key}.{part}"
    return f"{name} was {shorten(was)} and is now {shorten(is_now)}"


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was cut before that was written
        return {}
    return found if isinstance(found, dict) else {}
