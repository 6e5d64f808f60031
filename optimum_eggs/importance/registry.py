"""The importance scores by name, with one calling convention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ConfigError, ShapeError
from .magnitude import magnitude
from .ria import ria
from .wanda import wanda

Score = Callable[[Tensor, Tensor, float], Tensor]

IMPORTANCE: dict[str, Score] = {
    "magnitude": lambda weight, _norm, _exponent: magnitude(weight),
    "wanda": lambda weight, input_norm, _exponent: wanda(weight, input_norm),
    "ria": ria,
}
"""Name -> function of weight (out, in), input_norm (in,) and the exponent; returns a score (out, in)."""


def register_importance(name: str, score: Score) -> None:
    """Make a score of your own known as `importance=name`, in this process.

    A model pruned with it stores the name alone, and loads anywhere: loading needs no score.

    Args:
        name: An identifier that is not taken.
        score: Function of weight (out, in), float32; input_norm (in,), the L2 norm of each input over all calibration
            tokens; and `EGGSConfig.exponent`. Returns a finite score (out, in); larger means keep.

    Raises:
        ConfigError: the name is no identifier or taken, or `score` cannot be called.

    >>> import torch
    >>> register_importance("energy", lambda weight, input_norm, exponent: (weight * input_norm) ** 2)
    >>> IMPORTANCE.pop("energy")(torch.tensor([[2.0]]), torch.tensor([3.0]), 0.5)
    tensor([[36.]])
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"importance={name!r} is no identifier; use letters, digits and underscores")
    if name in IMPORTANCE:
        raise ConfigError(f"importance={name!r} is taken; choose another name")
    if not callable(score):
        raise ConfigError(f"score={score!r} for importance={name!r} cannot be called; pass a function")
    IMPORTANCE[name] = score


def importance_score(name: str, weight: Tensor, input_norm: Tensor, exponent: float = 0.5) -> Tensor:
    """The score called `name`. weight (out, in); input_norm (in,). Returns (out, in).

    Raises:
        ConfigError: no score has that name.
        ShapeError: a registered score returns another shape.
    """
    if name not in IMPORTANCE:
        raise ConfigError(unknown_importance(name))
    score = IMPORTANCE[name](weight, input_norm, exponent)
    if score.shape != weight.shape:
        raise ShapeError(
            f"importance={name!r} returned a score of shape {tuple(score.shape)} for a weight of "
            f"{tuple(weight.shape)}; it must give every weight a score"
        )
    return score


def unknown_importance(name: object) -> str:
    """What is said of a name that no score has."""
    return (
        f"importance={name!r} is unknown; use one of {sorted(IMPORTANCE)}, or make it known with "
        "optimum_eggs.register_importance"
    )
