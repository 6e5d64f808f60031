"""Masks: a score (out, in) in, a boolean mask (out, in) with n kept of every m out."""

from .diagonal import diagonal_mask
from .expander import expander_mask
from .permutation import channel_order
from .recognise import nonzero_mask, tightest_pattern
from .shortfall import Shortfall, shortfall
from .swap import swap_mask
from .topn import topn_mask

__all__ = [
    "Shortfall",
    "channel_order",
    "diagonal_mask",
    "expander_mask",
    "nonzero_mask",
    "shortfall",
    "swap_mask",
    "tightest_pattern",
    "topn_mask",
]
