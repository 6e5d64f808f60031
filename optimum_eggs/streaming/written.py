"""The windows that the dense model wrote in a run that may be cut: written once, and kept beside its blocks."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import sync

logger = logging.getLogger(__name__)

_NAME = "generated.safetensors"


def write_windows(folder: Path, ids: Tensor) -> None:
    """Write token ids (windows, tokens) into a run's folder; they are there as a whole, or not at all."""
    begun = folder / f"{_NAME}.partial"
    save_file({"ids": ids.contiguous()}, begun)
    sync(begun)
    begun.replace(folder / _NAME)
    sync(folder)


def read_windows(folder: Path) -> Tensor | None:
    """Those in a run's folder; None if there are none, or they cannot be read, which a warning says."""
    if not (folder / _NAME).is_file():
        return None
    try:
        return load_file(folder / _NAME)["ids"]
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("%s: cannot be read (%s), so the windows are written again", folder / _NAME, error)
        return None
