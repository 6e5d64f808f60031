"""Importance scores: tensors in, a score (out, in) out; larger means keep."""

from .magnitude import magnitude
from .registry import IMPORTANCE, importance_score, register_importance, unknown_importance
from .ria import ria
from .wanda import wanda

__all__ = [
    "IMPORTANCE",
    "importance_score",
    "magnitude",
    "register_importance",
    "ria",
    "unknown_importance",
    "wanda",
]
