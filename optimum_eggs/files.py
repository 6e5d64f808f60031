"""The files of a folder that this package wrote: listed in its record, the weights with their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

REPORT_NAME = "report.json"
"""The record of a folder: what is known of the model in it, and which files are ours."""

_FILES = "files"
_WEIGHTS = (".safetensors",)


def seal(folder: Path) -> None:
    """Put the list of all files in `folder` into its record, weight files with their SHA-256, other files with None."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted({REPORT_NAME, *found})
    files = {name: sha256(folder / name) if name.endswith(_WEIGHTS) else None for name in names}
    record = _read(folder) | {_FILES: files}
    write_durably(folder / REPORT_NAME, json.dumps(record, indent=2, allow_nan=False) + "\n")


def add_to_list(folder: Path, paths: Iterable[Path]) -> None:
    """Add files that were written since to the list of a folder that has one. The file is replaced in one step."""
    files = listed_files(folder)
    names = {path.relative_to(folder).as_posix() for path in paths} - files.keys()
    if not files or not names:
        return
    record = _read(folder) | {_FILES: dict(sorted((files | dict.fromkeys(names)).items()))}
    write_durably(folder / REPORT_NAME, json.dumps(record, indent=2, allow_nan=False) + "\n")


def listed_files(folder: Path) -> dict[str, str | None]:
    """The files that the record of a folder lists: name, with / between its parts -> SHA-256 of a weight file, or None.

    Empty where there is no record, or none that can be read.
    """
    files = _read(folder).get(_FILES)
    return {name: digest for name, digest in files.items() if _is_inside(name)} if isinstance(files, dict) else {}


def changed_files(folder: Path) -> list[str]:
    """Names of the weight files that are no more what the record says; not of those that are missing."""
    listed = listed_files(folder)
    return [
        name
        for name, digest in listed.items()
        if digest is not None and (folder / name).is_file() and sha256(folder / name) != digest
    ]


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, written to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a text file in one step: after a crash it is the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
