"""The N:M mask that a dense weight with zeros already has, whatever put the zeros there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pattern import NMPattern
from .topn import topn_mask

_DENSITIES = (["1:8", "2:16"], ["1:4", "2:8", "4:16"], ["1:2", "2:4", "4:8", "8:16"], ["3:4", "6:8"])
USUAL = tuple(NMPattern.parse(text) for texts in _DENSITIES for text in texts)
"""The patterns that a weight is tried for, the tightest first: fewest kept, then the smallest group."""


def follows(weight: Tensor, pattern: NMPattern) -> bool:
    """Whether m divides the columns of weight (out, in), and no group has more than n values that are not zero.

    >>> follows(torch.tensor([[1.0, 0, 0, 0]]), NMPattern(2, 4)), follows(torch.ones(1, 4), NMPattern(2, 4))
    (True, False)
    """
    if weight.shape[1] % pattern.m:
        return False
    return bool((weight.unflatten(1, (-1, pattern.m)).count_nonzero(-1) <= pattern.n).all())


def tightest_pattern(weight: Tensor) -> NMPattern | None:
    """The first of the `USUAL` patterns that weight (out, in) follows; None if it follows none of them.

    >>> tightest_pattern(torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4]]))
    NMPattern(n=2, m=4)
    """
    return next((pattern for pattern in USUAL if follows(weight, pattern)), None)


def nonzero_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The mask (out, in) of all nonzeros of weight (out, in), with zeros taken in where a group has fewer than n.

    Those with a minus sign are taken in first, so that as many bits as can be stay as they are; then the first ones.

    Raises:
        ShapeError: a group has more than n nonzeros, or m does not divide in.

    >>> nonzero_mask(torch.tensor([[0.0, 0.0, 5.0, 0.0]]), NMPattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    if not follows(weight, pattern):
        raise ShapeError(
            f"weight {tuple(weight.shape)} has not the zeros of {pattern}; choose a pattern that it follows"
        )
    rank = (weight != 0).to(torch.float32) * 2 + ((weight == 0) & weight.signbit())
    # Every place of a group has a score of its own, so the mask is the same on every machine.
    place = torch.arange(pattern.m, 0, -1, dtype=torch.float32, device=weight.device) / (pattern.m + 1)
    return topn_mask(rank + place.repeat(weight.shape[1] // pattern.m), pattern)
