"""The packed layer, and the dense layers it replaces."""

from .coded import CodedLinear
from .dense import dense_weight, is_dense_linear
from .embedding import CodedEmbedding
from .linear import NMLinear
from .norm import MatrixNorm
from .packed import PackedLinear, coded_modules, is_packed, packed_layers, pattern_of, values_kept
from .rounded import RoundedLinear

__all__ = [
    "CodedEmbedding",
    "CodedLinear",
    "MatrixNorm",
    "NMLinear",
    "PackedLinear",
    "RoundedLinear",
    "coded_modules",
    "dense_weight",
    "is_dense_linear",
    "is_packed",
    "packed_layers",
    "pattern_of",
    "values_kept",
]
