"""Whether a mask is of its pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pattern import NMPattern


def illegal_groups(mask: Tensor, pattern: NMPattern) -> Tensor:
    """(row, group) of every group that does not keep exactly n, (count, 2), of a boolean mask (out, in).

    >>> illegal_groups(torch.tensor([[True, True, False, False], [True, True, True, False]]), NMPattern(2, 4))
    tensor([[1, 0]])
    """
    return (mask.unflatten(1, (-1, pattern.m)).sum(-1) != pattern.n).nonzero()


def check_legal(mask: Tensor, pattern: NMPattern) -> None:
    """Raise unless `mask` (out, in) is boolean and every group of every row keeps exactly n.

    Raises:
        ShapeError: it is not.
    """
    if mask.shape[1] % pattern.m:
        raise ShapeError(f"mask has in={mask.shape[1]}, which is not a multiple of m={pattern.m}")
    if mask.dtype != torch.bool:
        raise ShapeError(f"mask has dtype {mask.dtype}; it must be torch.bool")
    wrong = illegal_groups(mask, pattern)
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ShapeError(
            f"mask keeps {kept_in_group(mask, pattern, row, group)} of the {pattern.m} positions of row {row}, group "
            f"{group}; {pattern} keeps exactly {pattern.n}; use a mask of this pattern, such as that of `topn_mask`"
        )


def kept_in_group(mask: Tensor, pattern: NMPattern, row: int, group: int) -> int:
    """How many positions of one group are kept."""
    return int(mask[row, group * pattern.m : (group + 1) * pattern.m].sum())
