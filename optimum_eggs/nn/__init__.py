"""The packed layer, and the dense layers it replaces."""

from .dense import dense_weight, is_dense_linear
from .linear import NMLinear

__all__ = ["NMLinear", "dense_weight", "is_dense_linear"]
