"""What can be said for certain about the connectivity of one pruned layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..packing.legal import illegal_groups
from ..pattern import NMPattern
from .expander import bands


@dataclass(frozen=True)
class Certificate:
    """The certificate of one layer: the degrees of its bipartite graph, and the floor that holds.

    The graph has a left node for every input, a right node for every output and an edge for every weight kept. A
    degree floor does not imply expansion of small subsets; spectral gaps are measured apart, by
    `optimum_eggs.masks.spectra`.

    Attributes:
        legal: Every group of every row keeps exactly n.
        input_degree_min, input_degree_mean, input_degree_max: Outputs that an input keeps.
        input_degree_cv: Standard deviation of the input degrees over their mean.
        starved_inputs: Inputs that no output keeps.
        floors: band -> the largest B such that every input keeps at least B outputs of every band of that many rows
            (a last band takes the remainder).
    """

    legal: bool
    input_degree_min: int
    input_degree_mean: float
    input_degree_max: int
    input_degree_cv: float
    starved_inputs: int
    floors: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the bands of `floors` become strings."""
        return asdict(self) | {"floors": {str(band): degree for band, degree in self.floors.items()}}


def certify(mask: Tensor, pattern: NMPattern, extra_bands: tuple[int, ...] = ()) -> Certificate:
    """Compute the certificate of a layer.

    mask (out, in), boolean. `extra_bands` are bands to report the floor of, besides m, 16, 64, 256 and all rows.

    Raises:
        ShapeError: the mask is no matrix, or m does not divide in.
    """
    if mask.dim() != 2 or mask.shape[1] % pattern.m:
        raise ShapeError(f"mask {tuple(mask.shape)} must be (out, in) with in a multiple of m={pattern.m}")
    rows = len(mask)
    degree = mask.sum(0)
    mean = float(degree.double().mean())
    heights = sorted({band for band in (pattern.m, 16, 64, 256, *extra_bands) if band < rows} | {rows})
    return Certificate(
        legal=not len(illegal_groups(mask, pattern)),
        input_degree_min=int(degree.min()),
        input_degree_mean=mean,
        input_degree_max=int(degree.max()),
        input_degree_cv=float(degree.double().std(correction=0)) / mean if mean else 0.0,
        starved_inputs=int((degree == 0).sum()),
        floors={band: floor(mask, band) for band in heights},
    )


def floor(mask: Tensor, band: int) -> int:
    """The largest B such that every input keeps at least B outputs of every `band` rows. mask (out, in).

    >>> floor(torch.tensor([[True, False], [False, True], [True, False], [True, False]]), band=2)
    0
    >>> floor(torch.tensor([[True, False], [False, True], [True, False], [True, False]]), band=4)
    1
    """
    stretches = [
        mask[start:stop].unflatten(0, (-1, height)).sum(1).min() for start, stop, height in bands(len(mask), band)
    ]
    return int(torch.stack(stretches).min()) if stretches else 0
