"""The journal of a run: which blocks are finished, durable at any moment, and for which run they are good."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import strict_json
from ..engine.block import BlockResult
from ..engine.report import DenseLayer, LayerReport
from ..engine.tune import BlockTuning
from ..errors import NumericalError
from ..files import sha256, sync, write_durably
from ..masks import Shortfall
from ..masks.certificate import Certificate

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.json"


@dataclass(frozen=True)
class Finished:
    """A finished block: its file, the SHA-256 of that, what became of the block, and what its run had taken for it.

    `seconds`: since the block before was finished, or since the run began. `peak_rss`: of the run until then, in bytes.
    """

    file: str
    sha256: str
    result: BlockResult
    seconds: float
    peak_rss: int


class Journal:
    """The finished blocks of a run, in the run's own folder.

    A block is written, synced to disk and only then recorded; the record replaces the one before in one step. So the
    journal never names a file that is not whole, whenever the run is cut. A journal that cannot be read all the same
    counts as none.

    Args:
        folder: Where finished blocks are.

    Attributes:
        finished: The finished blocks, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: list[Finished] = []
        self._entries: list[str] = []  # as they are written: a mixture has thousands of layers in every block
        path = folder / JOURNAL_NAME
        if not path.is_file():
            return
        try:
            for entry in json.loads(path.read_text(encoding="utf-8")):
                file = folder / entry["file"]
                if not file.is_file() or sha256(file) != entry["sha256"]:
                    break  # what follows was computed from it
                took = float(entry["seconds"]), int(entry["peak_rss"])
                self._append(Finished(entry["file"], entry["sha256"], _result(entry["result"]), *took))
        except (NumericalError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read (%s), so the run starts from the beginning", path, error)
            self.finished, self._entries = [], []

    def forget(self) -> None:
        """Begin from the first block again, whatever becomes of this run."""
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        self.finished, self._entries = [], []

    def add(self, file: str, result: BlockResult, seconds: float, peak_rss: int) -> None:
        """Record that the next block is finished; its `file` is in the folder."""
        sync(self.folder / file)
        sync(self.folder)
        self._append(Finished(file, sha256(self.folder / file), result, seconds, peak_rss))
        write_durably(self.folder / JOURNAL_NAME, "[" + ",\n".join(self._entries) + "]")

    def _append(self, block: Finished) -> None:
        took = {"seconds": block.seconds, "peak_rss": block.peak_rss}
        entry = {"file": block.file, "sha256": block.sha256, **took, "result": _as_json(block.result)}
        self._entries.append(strict_json.dumps(entry, indent=1))
        self.finished.append(block)


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
    tuning, rounding = (None if found[key] is None else BlockTuning(**found[key]) for key in ("tuning", "rounding"))
    return BlockResult(layers, tuning, [DenseLayer(**layer) for layer in found["left_dense"]], rounding)
