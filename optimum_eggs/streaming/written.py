"""The windows that the dense model wrote in a run that may be cut: written once, and kept beside its blocks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_durably

logger = logging.getLogger(__name__)

_NAME = "generated.json"


def write_windows(folder: Path, ids: Tensor) -> None:
    """Write token ids (windows, tokens) into a run's folder; they are there as a whole, or not at all."""
    write_durably(folder / _NAME, json.dumps(ids.tolist()))


def read_windows(folder: Path) -> Tensor | None:
    """Those in a run's folder; None if there are none, or they cannot be read, which a warning says."""
    if not (folder / _NAME).is_file():
        return None
    try:
        return torch.tensor(json.loads((folder / _NAME).read_text("utf-8")), dtype=torch.int64)
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: cannot be read (%s), so the windows are written again", folder / _NAME, error)
        return None
