"""What can be said for certain about the connectivity of one pruned layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError
from ..packing.legal import illegal_groups
from ..pattern import NMPattern
from .expander import bands


@dataclass(frozen=True)
class Certificate:
    """The certificate of one layer: degrees, the floor that holds, and the spectral gaps of its bipartite graph.

    The graph has a left node for every input, a right node for every output and an edge for every weight kept. What
    is certain are the degrees. A degree floor does not imply expansion of small subsets; the spectral gaps are
    measured, and at 50 % density almost any mask passes the Ramanujan bound, so the bound says little.

    Attributes:
        legal: Every group of every row keeps exactly n.
        input_degree_min, input_degree_mean, input_degree_max: Outputs that an input keeps.
        input_degree_cv: Standard deviation of the input degrees over their mean.
        starved_inputs: Inputs that no output keeps.
        floors: band -> the largest B such that every input keeps at least B outputs of every band of that many rows
            (a last band takes the remainder).
        sigma2: Second singular value of the biadjacency D_out^-½ K D_in^-½ (the first is 1); 1 − sigma2 is the gap.
        sigma2_weighted: The same for |Z| in place of K, with its weighted degrees.
        ramanujan: (√(d_in − 1) + √(d_out − 1)) / √(d_in d_out) at the mean degrees.
    """

    legal: bool
    input_degree_min: int
    input_degree_mean: float
    input_degree_max: int
    input_degree_cv: float
    starved_inputs: int
    floors: dict[int, int]
    sigma2: float
    sigma2_weighted: float
    ramanujan: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the bands of `floors` become strings."""
        return asdict(self) | {"floors": {str(band): degree for band, degree in self.floors.items()}}


def certify(mask: Tensor, weight: Tensor, pattern: NMPattern, extra_bands: tuple[int, ...] = ()) -> Certificate:
    """Compute the certificate of a layer.

    mask (out, in), boolean; weight (out, in), zero off the mask. `extra_bands` are bands to report the floor of,
    besides m, 16, 64, 256 and all rows.

    Raises:
        ShapeError: mask and weight differ in shape, or m does not divide in.
    """
    if mask.shape != weight.shape or mask.dim() != 2 or mask.shape[1] % pattern.m:
        raise ShapeError(
            f"mask {tuple(mask.shape)} and weight {tuple(weight.shape)} must be (out, in) with in a multiple of "
            f"m={pattern.m}"
        )
    rows, columns = mask.shape
    degree = mask.sum(0)
    mean = float(degree.double().mean())
    heights = sorted({band for band in (pattern.m, 16, 64, 256, *extra_bands) if band < rows} | {rows})
    out_degree = columns * pattern.density
    return Certificate(
        legal=not len(illegal_groups(mask, pattern)),
        input_degree_min=int(degree.min()),
        input_degree_mean=mean,
        input_degree_max=int(degree.max()),
        input_degree_cv=float(degree.double().std(correction=0)) / mean if mean else 0.0,
        starved_inputs=int((degree == 0).sum()),
        floors={band: floor(mask, band) for band in heights},
        sigma2=second_singular_value(mask.to(torch.float32)),
        sigma2_weighted=second_singular_value(weight.abs().to(torch.float32)),
        ramanujan=(math.sqrt(max(mean - 1, 0)) + math.sqrt(max(out_degree - 1, 0))) / math.sqrt(mean * out_degree)
        if mean
        else 0.0,
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


def second_singular_value(adjacency: Tensor, tolerance: float = 1e-4) -> float:
    """Second singular value of D_out^-½ A D_in^-½, for A (out, in) ≥ 0 with degrees D; the first is 1.

    The first pair of singular vectors is known (√degrees), so it is taken out and the largest that is left is found
    by Lanczos iteration (`scipy.sparse.linalg.eigsh`) to a relative `tolerance`. Nodes without edges are left out.
    Returns 0 for a graph with one node on a side.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    adjacency = adjacency[adjacency.sum(1) > 0][:, adjacency.sum(0) > 0]
    if adjacency.shape[0] > adjacency.shape[1]:
        adjacency = adjacency.t()
    rows, columns = adjacency.shape
    if min(rows, columns) < 2:
        return 0.0
    left, right = adjacency.sum(1, dtype=torch.float64).sqrt(), adjacency.sum(0, dtype=torch.float64).sqrt()
    scaled = adjacency / left.to(adjacency.dtype)[:, None] / right.to(adjacency.dtype)
    top = left / left.norm()

    def deflate(vector: Tensor) -> Tensor:
        return vector - top * (top @ vector)

    def multiply(vector: np.ndarray) -> np.ndarray:
        x = deflate(torch.from_numpy(vector.reshape(-1)).to(top))
        x = (scaled @ (scaled.t() @ x.to(scaled.dtype))).to(top)
        return deflate(x).cpu().numpy()

    def all_values() -> float:
        return float(torch.linalg.eigvalsh((scaled @ scaled.t()).to(top) - torch.outer(top, top)).max())

    if rows < 32:  # too small for Lanczos
        return math.sqrt(max(all_values(), 0.0))
    start = np.random.default_rng(0).standard_normal(rows)
    operator = LinearOperator((rows, rows), matvec=multiply, dtype=np.float64)
    try:
        value = float(eigsh(operator, k=1, which="LA", v0=start, tol=2 * tolerance, return_eigenvectors=False)[0])
    except ArpackError:  # no convergence, or nothing is left once the first pair is out
        value = all_values()
    return math.sqrt(max(value, 0.0))
