"""The packed form of an N:M matrix: the values kept and one bit for every position. See docs/format.md."""

import torch  # noqa: F401 - first: `ops` is imported with it, and needs what is in here

from .layout import FLOAT_VERSION, FORMAT_VERSION, meta_width, packed_width
from .pack import kept_positions, pack, pack_mask, unpack, unpack_mask

__all__ = [
    "FLOAT_VERSION",
    "FORMAT_VERSION",
    "kept_positions",
    "meta_width",
    "pack",
    "pack_mask",
    "packed_width",
    "unpack",
    "unpack_mask",
]
