"""Checks of the values of a configuration: each returns the value as it is stored, or raises `ConfigError`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from .errors import ConfigError

TORCH_SEEDS = 2**64 - 1
"""The largest seed of torch's generators."""

NUMPY_SEEDS = 2**32 - 1
"""That of numpy's, which transformers' Trainer seeds as well."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", re.IGNORECASE | re.ASCII)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value`, if it is an integer of at least `least`, and of at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name}={value!r} must be an integer {allowed}")
    return value


def size(name: str, value: Any, least: int = 1) -> int:
    """A number of bytes of at least `least`, given as such or as a text: `"5GB"` (of 10⁹ bytes), `"8GiB"` (of 2³⁰).

    >>> size("max_shard_size", "5GB"), size("max_shard_size", "8 GiB"), size("max_shard_size", 100)
    (5000000000, 8589934592, 100)
    """
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        number, unit, binary = found.groups()
        value = int(Fraction(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is no size; write a number of bytes, or such as '8GiB'")
    if value < least:
        raise ConfigError(f"{name}={value!r} bytes are too few; give at least {least}")
    return value


def number(name: str, value: Any, least: float, most: float | None = None) -> float:
    """`value` as a float, if it is finite and between `least` and `most`."""
    allowed = f"of at least {least}" if most is None else f"between {least} and {most}"
    limit = float("inf") if most is None else most
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not least <= value <= limit or value == float("inf"):
        raise ConfigError(f"{name}={value!r} must be a finite number {allowed}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False")
    return value


def text(name: str, value: Any) -> str | None:
    """`value`, if it is None or a text that is not empty."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name}={value!r} must be a text that is not empty, or None")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    """`value`, if it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {list(allowed)}")
    return value


def names(name: str, value: Any) -> list[str] | None:
    """`value` as a list, if it is None or a list of name patterns."""
    if value is None:
        return None
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    items = list(value) if listed else []
    if not listed or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f'{name}={value!r} must be a list of name patterns; write for example {name}=["down_proj"]')
    return items


def modules(name: str, value: Any, parse: Callable[[str], Any], what: str) -> dict[str, str] | None:
    """`value` as a dictionary name -> `what` can be parsed, as it is written, if it is None or such a mapping."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(module, str) for module in value):
        raise ConfigError(f"{name}={value!r} must map the names of layers to {what}")
    return {module: str(parse(text)) for module, text in value.items()}
