"""What solvers ask of a mask that they begin with."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..packing.legal import check_legal
from ..pattern import NMPattern
from .expander import bands, check_floor


def check_mask(mask: Tensor, pattern: NMPattern, min_degree: int = 0, band: int = 16) -> None:
    """Raise unless `mask` (out, in) is legal, and every input keeps `min_degree` outputs of every band of rows.

    Raises:
        ShapeError: it is not boolean, m does not divide in, or a group does not keep exactly n.
        ConfigError: the floor does not hold in it, or could hold in none.
    """
    check_legal(mask, pattern)
    check_floor(len(mask), pattern, min_degree, band)
    for start, stop, height in bands(len(mask), band) if min_degree else []:
        degree = mask[start:stop].unflatten(0, (-1, height)).sum(1)
        if bool((degree < min_degree).any()):
            index, column = (degree < min_degree).nonzero()[0].tolist()
            first = start + index * height
            raise ConfigError(
                f"min_degree={min_degree} does not hold in the mask: rows {first} to {first + height - 1} keep "
                f"{int(degree[index, column])} weights of input {column}; pass the min_degree and band that the mask "
                "was made with, or 0 for no floor"
            )
