"""What a mask without a floor lacks of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..pattern import NMPattern
from .expander import bands


@dataclass(frozen=True)
class Shortfall:
    """How far a mask is from a floor on the degrees of its inputs.

    Attributes:
        input_degree_min: Fewest outputs that an input keeps.
        input_degree_cv: Standard deviation of the input degrees over their mean.
        starved_inputs: Inputs that no output keeps.
        short: Pairs of a band and an input that keeps fewer outputs of it than the floor asks for.
        pairs: All pairs of a band and an input.
        row, column: First row and first column of the tile with the input that keeps least of a band.
        tile: That tile, a string for each row, "1" for a weight kept.
    """

    input_degree_min: int
    input_degree_cv: float
    starved_inputs: int
    short: int
    pairs: int
    row: int
    column: int
    tile: list[str]


def shortfall(mask: Tensor, pattern: NMPattern, min_degree: int, band: int) -> Shortfall:
    """Measure a boolean mask (out, in) against the floor of `min_degree` outputs of every `band` rows.

    >>> import torch
    >>> found = shortfall(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool(), NMPattern(2, 4), min_degree=1, band=2)
    >>> found.short, found.starved_inputs, found.tile
    (1, 1, ['1100', '1010'])
    """
    degree = mask.sum(0).double()
    kept = [
        (start, height, mask[start:stop].unflatten(0, (-1, height)).sum(1))
        for start, stop, height in bands(len(mask), band)
    ]
    start, height, degrees = min(kept, key=lambda each: int(each[2].min()))
    worst = int(degrees.argmin())
    row, column = start + worst // mask.shape[1] * height, worst % mask.shape[1] // pattern.m * pattern.m
    tile = mask[row : row + height, column : column + pattern.m].int().tolist()
    return Shortfall(
        input_degree_min=int(degree.min()),
        input_degree_cv=float(degree.std(correction=0) / degree.mean()),
        starved_inputs=int((degree == 0).sum()),
        short=sum(int((each < min_degree).sum()) for _, _, each in kept),
        pairs=sum(each.numel() for _, _, each in kept),
        row=row,
        column=column,
        tile=["".join(map(str, line)) for line in tile],
    )
