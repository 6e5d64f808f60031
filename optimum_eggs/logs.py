"""Keeping other libraries from saying the same thing again and again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_RETRYING = "huggingface_hub.utils._http"


@contextmanager
def said_once() -> Iterator[None]:
    """Within, huggingface_hub's notes of a request that it tries again are printed once, not at every try."""
    heard: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        said = re.sub(r"[\d.]+", "0", record.getMessage())  # which try it is, and for how long it waits
        new = said not in heard
        heard.add(said)
        return new

    logger = logging.getLogger(_RETRYING)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


@contextmanager
def silent(library: str) -> Iterator[None]:
    """Within, a library logs nothing, as where its notes only repeat the error that it raises."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
