"""JSON as other programs read it: without NaN and infinity, which Python's own writes and reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import NumericalError


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON.

    Raises:
        NumericalError: a number in it is NaN or infinite.

    >>> dumps({"perplexity": [1.5]})
    '{"perplexity": [1.5]}'
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        where = _not_finite(value)
        if where is None:
            raise
        raise NumericalError(
            f"{where} is NaN or infinite, which is not written; look for where it comes from"
        ) from None


def loads(text: str) -> Any:
    """What JSON holds.

    Raises:
        ValueError: it is no JSON; NaN and infinity are none, nor is a number that no float holds.

    >>> loads('{"perplexity": [1e999]}')
    Traceback (most recent call last):
    ValueError: 1e999 is no number
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    def number(digits: str) -> float:
        found = float(digits)
        return found if math.isfinite(found) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _not_finite(value: Any, where: str = "") -> str | None:
    """Where the first number that is not finite is, such as `layers.3.error`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)  # type: ignore[assignment]
    else:
        return None
    found = (_not_finite(part, f"{where}.{key}".lstrip(".")) for key, part in parts)
    return next((each for each in found if each is not None), None)
