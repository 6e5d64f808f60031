"""Importance scores: tensors in, a score (out, in) out; larger means keep."""

from .magnitude import magnitude
from .registry import IMPORTANCE, importance_score
from .ria import ria
from .wanda import wanda

__all__ = ["IMPORTANCE", "importance_score", "magnitude", "ria", "wanda"]
