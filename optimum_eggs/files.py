"""The files of a folder that this package wrote: listed in its record, the weights with their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from . import strict_json
from .access import closed
from .errors import OutputError

REPORT_NAME = "report.json"
"""The record of a folder: what is known of the model in it, and which files are ours."""

_FILES = "files"
_WEIGHTS = (".safetensors",)


def seal(folder: Path) -> None:
    """Put the list of all files in `folder` into its record, weight files with their SHA-256, other files with None."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted({REPORT_NAME, *found})
    _write_list(folder, {name: sha256(folder / name) if name.endswith(_WEIGHTS) else None for name in names})


def add_to_list(folder: Path, paths: Iterable[Path]) -> None:
    """Add files that were written since, in `folder`, to its list, if it has one. The record is replaced whole."""
    here = folder.resolve()
    inside = (path.resolve() for path in paths)
    files = listed_files(folder)
    names = {path.relative_to(here).as_posix() for path in inside if path.is_relative_to(here)} - files.keys()
    if files and names:
        _write_list(folder, files | dict.fromkeys(names))


def listed_files(folder: Path) -> dict[str, str | None]:
    """The files that the record of a folder lists: name, with / between its parts -> SHA-256 of a weight file, or None.

    Empty where there is no record, or none that can be read.
    """
    files = _read(folder).get(_FILES)
    return {name: digest for name, digest in files.items() if _is_inside(name)} if isinstance(files, dict) else {}


def changed_files(folder: Path) -> list[str]:
    """Names of the weight files that are no more what the record says; not of those that are missing."""
    return [
        name
        for name, digest in listed_files(folder).items()
        if digest is not None and (folder / name).is_file() and _digest_now(folder / name) != digest
    ]


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sample(file: Path, pieces: int = 64, size: int = 4096) -> str:
    """The SHA-256 of some pieces of a file, evenly spread: whether two large files are likely to be the same."""
    length, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for piece in range(pieces):
            opened.seek(piece * max(0, length - size) // (pieces - 1))
            digest.update(opened.read(size))
    return digest.hexdigest()


def likeness(model: str | Path) -> str | dict[str, list[Any]]:
    """What a model is known again by: sizes and samples of its weight files; of one that is no folder, its name.

    Of files that may not be read, which it is not loaded from, the sizes alone.
    """
    folder = Path(model)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".gguf"))
    return {path.name: [path.stat().st_size, None if closed(path) else sample(path)] for path in files} or str(model)


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


@contextmanager
def file_written(path: Path, remedy: str) -> Iterator[None]:
    """Turn what keeps a file from being written within into an error that says how to go on.

    Raises:
        OutputError: instead of what was raised.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error}); {remedy}") from error


def _write_list(folder: Path, files: dict[str, str | None]) -> None:
    record = _read(folder) | {_FILES: dict(sorted(files.items()))}
    write_durably(folder / REPORT_NAME, strict_json.dumps(record, indent=2) + "\n")


def _digest_now(file: Path) -> str:
    found = file.stat()
    return _digest(file, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _digest(file: Path, *seen: int) -> str:
    """The SHA-256 of a file that was `seen` so: it is asked for before the work and after it."""
    return sha256(file)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
