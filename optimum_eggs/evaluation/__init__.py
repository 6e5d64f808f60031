"""Judging a model: perplexity, and what it takes on disk."""

from .perplexity import Perplexity, perplexity
from .size import ModelSize, model_size

__all__ = ["ModelSize", "Perplexity", "model_size", "perplexity"]
