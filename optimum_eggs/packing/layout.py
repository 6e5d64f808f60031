"""The widths of the packed tensors, and the numbers of the format. The specification in words is docs/format.md."""

from ..errors import ShapeError
from ..pattern import NMPattern

FLOAT_VERSION = 1
"""Of the format, where values are floats."""

FORMAT_VERSION = 2
"""Where values are integers."""


def packed_width(in_features: int, pattern: NMPattern) -> int:
    """Columns of the packed `weight`: in·n/m.

    Raises:
        ShapeError: `in_features` is not a positive multiple of m.

    >>> packed_width(4096, NMPattern(2, 4))
    2048
    """
    if in_features < 1 or in_features % pattern.m:
        raise ShapeError(f"in_features={in_features} is not a positive multiple of m={pattern.m}")
    return in_features // pattern.m * pattern.n


def meta_width(in_features: int) -> int:
    """Columns of `weight_meta`, in bytes: one bit for every dense position, a row padded to a whole byte.

    >>> meta_width(4096), meta_width(12)
    (512, 2)
    """
    return -(-in_features // 8)
