"""Pruning a checkpoint block by block from disk to disk, durably."""

from .fetch import is_streamable
from .prune import prune_checkpoint
from .source import DenseSource

__all__ = ["DenseSource", "is_streamable", "prune_checkpoint"]
