"""The journal of a run: which blocks are finished, durable at any moment, and for which run they are good."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..engine.block import BlockResult
from ..engine.report import DenseLayer, LayerReport
from ..engine.tune import BlockTuning
from ..errors import OutputError, shorten
from ..masks import Shortfall
from ..masks.certificate import Certificate

JOURNAL_NAME = "journal.json"
LOCK_NAME = "lock"
_OWNER_NAME = "owner.json"


@dataclass(frozen=True)
class Finished:
    """A finished block: its file, the SHA-256 of that, and what became of the block."""

    file: str
    sha256: str
    result: BlockResult


class Journal:
    """The finished blocks of a run, in a folder beside the output.

    A block is written, synced to disk and only then recorded; the record replaces the one before in one step. So the
    journal never names a file that is not whole, whenever the run is cut.

    Args:
        folder: Where finished blocks are.
        run: What decides the result, as JSON types.

    Attributes:
        finished: The finished blocks, in order.

    Raises:
        OutputError: the folder is of another run.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder, self.run = folder, json.loads(json.dumps(run))
        self.finished: list[Finished] = []
        path = folder / JOURNAL_NAME
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._check_same(found["run"])
            for entry in found["blocks"]:
                if _sha256(folder / entry["file"]) != entry["sha256"]:
                    break  # what follows was computed from it
                self.finished.append(Finished(entry["file"], entry["sha256"], _result(entry["result"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{path}: cannot be read ({error}); start again with --overwrite") from error

    def add(self, file: str, result: BlockResult) -> None:
        """Record that the next block is finished; its `file` is in the folder."""
        sync(self.folder / file)
        sync(self.folder)
        self.finished.append(Finished(file, _sha256(self.folder / file) or "", result))
        blocks = [
            {"file": block.file, "sha256": block.sha256, "result": _as_json(block.result)} for block in self.finished
        ]
        write_durably(self.folder / JOURNAL_NAME, json.dumps({"run": self.run, "blocks": blocks}, indent=1))

    def _check_same(self, before: dict[str, Any]) -> None:
        changed = sorted(key for key in self.run.keys() | before.keys() if self.run.get(key) != before.get(key))
        if changed:
            how = _change(changed[0], before.get(changed[0]), self.run.get(changed[0]))
            raise OutputError(
                f"{self.folder}: holds the finished blocks of another run: {how}; give what it was given to go on with "
                "it, or --overwrite to start again"
            )


def _change(key: str, was: Any, now: Any) -> str:
    """In words, how what decides the result differs from before."""
    part = None
    if isinstance(was, dict) and isinstance(now, dict):
        part = next(k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))
        was, now = was.get(part), now.get(part)
    if key == "model":
        how = "is not there any more" if now is None else "is new" if was is None else "changed since"
        return f"the model's file {part} {how}"
    if key == "calibration":
        return "the calibration text gives other tokens"
    name = key if part is None else f"{key}.{part}"
    return f"{name} was {shorten(was)} and is now {shorten(now)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while within.

    Raises:
        OutputError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{folder}: {_owner(folder)} is writing to it; wait for it, or name another output") from None
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": time.time()}
        (folder / _OWNER_NAME).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        (folder / _OWNER_NAME).unlink(missing_ok=True)
        lock.release()


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
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_NAME).read_text(encoding="utf-8"))
        minutes = (time.time() - owner["since"]) / 60
        return f"process {owner['pid']} of {owner['user']} on {owner['host']}, begun {minutes:.0f} minutes ago,"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        return "another process"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in containers
        return str(os.getuid())


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
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


def _as_json(result: BlockResult) -> dict[str, Any]:
    layers = [asdict(layer) | {"certificate": layer.certificate.to_dict()} for layer in result.layers]
    return asdict(result) | {"layers": layers}


def _result(found: dict[str, Any]) -> BlockResult:
    layers = []
    for layer in found["layers"]:
        certificate = layer["certificate"]
        floors = {int(band): degree for band, degree in certificate["floors"].items()}
        alone = layer["scores_alone"]
        layers.append(
            LayerReport(
                **layer
                | {
                    "certificate": Certificate(**certificate | {"floors": floors}),
                    "scores_alone": None if alone is None else Shortfall(**alone),
                }
            )
        )
    tuning = None if found["tuning"] is None else BlockTuning(**found["tuning"])
    return BlockResult(layers, tuning, [DenseLayer(**layer) for layer in found["left_dense"]])
