"""Spectral gaps of a pruned layer's bipartite graph: measured where they are asked for, and certain of nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class Spectra:
    """Spectral gaps of a layer's bipartite graph, which has an edge for every weight kept.

    A floor on degrees does not imply a gap, nor a gap expansion of all small subsets. At 50 % density almost any mask
    passes the Ramanujan bound, so the bound separates nothing.

    Attributes:
        sigma2: Second singular value of the biadjacency D_out^-½ K D_in^-½ (the first is 1); 1 − sigma2 is the gap.
        sigma2_weighted: The same for |Z| in place of K, with its weighted degrees.
        ramanujan: (√(d_in − 1) + √(d_out − 1)) / √(d_in d_out) at the mean degrees.
    """

    sigma2: float
    sigma2_weighted: float
    ramanujan: float


def spectra(mask: Tensor, weight: Tensor) -> Spectra:
    """Measure the spectra of a layer: mask (out, in), boolean; weight (out, in), zero off the mask.

    Raises:
        ShapeError: mask and weight differ in shape, or are no matrices.
    """
    if mask.shape != weight.shape or mask.dim() != 2:
        raise ShapeError(f"mask {tuple(mask.shape)} and weight {tuple(weight.shape)} must both be (out, in)")
    edges = int(mask.sum())
    out_degree, in_degree = edges / mask.shape[0], edges / mask.shape[1]
    bound = math.sqrt(max(in_degree - 1, 0)) + math.sqrt(max(out_degree - 1, 0))
    return Spectra(
        second_singular_value(mask.to(torch.float32)),
        second_singular_value(weight.abs().to(torch.float32)),
        bound / math.sqrt(in_degree * out_degree) if edges else 0.0,
    )


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
