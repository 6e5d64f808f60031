"""The rotation of a run that may be cut: chosen once, and kept beside the blocks that were pruned in its basis."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine.fold import Fold, Rows
from ..engine.residual import BlockParts, OutsideParts, Readers
from ..engine.rotate import Turn
from ..engine.rotation import Rotation
from ..files import sync

logger = logging.getLogger(__name__)

_NAME = "rotation.safetensors"


def write_turn(folder: Path, turn: Turn | str) -> None:
    """Write the rotation, or why there is none, into a run's folder; it is there as a whole, or not at all."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"reason": turn}
    if isinstance(turn, Turn):
        found = turn.rotation
        tensors = {"residual": found.residual, "gains": turn.gains}
        tensors |= {f"values.{i}.{j}": turns for i, block in enumerate(found.values) for j, turns in enumerate(block)}
        about = {
            "blocks": [asdict(parts) for parts in turn.blocks],
            "outside": asdict(turn.outside),
            "lost": [found.lost_before, found.lost_after],
        }
    begun = folder / f"{_NAME}.partial"
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, begun, {"turn": json.dumps(about)})
    sync(begun)
    begun.replace(folder / _NAME)
    sync(folder)


def read_turn(folder: Path) -> Turn | str | None:
    """What is in a run's folder; None if nothing is, or it cannot be read, which a warning says."""
    if not (folder / _NAME).is_file():
        return None
    try:
        with safe_open(str(folder / _NAME), framework="pt") as file:
            about = json.loads(file.metadata()["turn"])
            if "reason" in about:
                return str(about["reason"])
            blocks = [_block(parts) for parts in about["blocks"]]
            values: list[list[Tensor]] = [
                [file.get_tensor(f"values.{i}.{j}") for j in range(len(parts.heads))] for i, parts in enumerate(blocks)
            ]
            rotation = Rotation(file.get_tensor("residual"), values, *about["lost"])
            return Turn(blocks, OutsideParts(**about["outside"]), rotation, file.get_tensor("gains"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s), so the run starts from the beginning", folder / _NAME, error)
        return None


def _block(parts: dict[str, Any]) -> BlockParts:
    readers = tuple(Readers(each["norm"], tuple(each["linears"])) for each in parts["readers"])
    heads = tuple(
        Fold(**fold | {"producers": tuple(Rows(**rows) for rows in fold["producers"])}) for fold in parts["heads"]
    )
    return BlockParts(readers, tuple(parts["writers"]), heads)
