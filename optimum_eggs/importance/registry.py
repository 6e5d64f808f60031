"""The importance scores by name, with one calling convention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ConfigError
from .magnitude import magnitude
from .ria import ria
from .wanda import wanda

IMPORTANCE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "magnitude": lambda weight, _norm, _exponent: magnitude(weight),
    "wanda": lambda weight, input_norm, _exponent: wanda(weight, input_norm),
    "ria": ria,
}
"""Name -> function of weight (out, in), input_norm (in,) and the exponent; returns a score (out, in)."""


def importance_score(name: str, weight: Tensor, input_norm: Tensor, exponent: float = 0.5) -> Tensor:
    """The score called `name`. weight (out, in); input_norm (in,). Returns (out, in).

    Raises:
        ConfigError: no score has that name.
    """
    if name not in IMPORTANCE:
        raise ConfigError(f"importance={name!r} is unknown; use one of {sorted(IMPORTANCE)}")
    return IMPORTANCE[name](weight, input_norm, exponent)
