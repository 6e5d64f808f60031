"""Judging a model: perplexity, two models compared, and what a model takes on disk."""

from .paired import Comparison, Estimate, compare
from .perplexity import Perplexity, perplexity
from .reading import Reading, read
from .size import ModelSize, model_size

__all__ = [
    "Comparison",
    "Estimate",
    "ModelSize",
    "Perplexity",
    "Reading",
    "compare",
    "model_size",
    "perplexity",
    "read",
]
