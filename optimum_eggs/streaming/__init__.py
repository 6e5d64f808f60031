"""Pruning a checkpoint block by block from disk to disk, durably."""

from .prune import prune_checkpoint
from .source import DenseSource, is_streamable

__all__ = ["DenseSource", "is_streamable", "prune_checkpoint"]
