"""Calibration: text to token windows, and the walk of those windows through a model, block by block."""

from .batches import batches_of
from .blocks import BlockList, find_block_list
from .providers import BlockProvider, InMemoryBlocks
from .statistics import GramAccumulator
from .walk import DenseTwin, Walk
from .windows import Windows, token_windows

__all__ = [
    "BlockList",
    "BlockProvider",
    "DenseTwin",
    "GramAccumulator",
    "InMemoryBlocks",
    "Walk",
    "Windows",
    "batches_of",
    "find_block_list",
    "token_windows",
]
