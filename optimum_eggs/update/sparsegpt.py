"""SparseGPT: mask and surviving weights in one pass over the columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError, ShapeError
from ..masks import topn_mask
from ..pattern import NMPattern
from .problem import Problem


def sparsegpt(
    weight: Tensor,
    problem: Problem,
    pattern: NMPattern,
    block_size: int = 128,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), as its published code does it for N:M patterns.

    H = XXᵀ + damping · mean(diag XXᵀ) · I, and U is the upper Cholesky factor of H⁻¹: U_jj² is the first entry of the
    inverse of H over the columns from j on. From left to right, each group keeps its n largest w² / U_jj², with the
    weights as updated so far; every weight w_j that goes moves the rest of its row by −w_j / U_jj · U_j. Columns to the
    left never move again, which is what makes one factor serve all rows. An input that was always zero counts with
    H_jj = 1 before damping, and its weights become zero.

    Args:
        weight: W (out, in), float32 or float64.
        problem: Of its inputs.
        pattern: n kept of every m inputs.
        block_size: Columns after which the rest of the matrix is brought up to date, rounded up to a multiple of m.
            It changes speed and rounding, nothing else.
        choose: From the saliency of a group (out, m), w² / U_jj² up to a factor, to the mask (out, m) of the largest
            total that is allowed.
            Default: the n largest of every row. Under a floor, a row that has to keep another weight than its largest
            makes up for it in the columns to the right, as it does for every weight that goes.

    Returns:
        The mask (out, in), boolean, with exactly n in every group, and the new weight (out, in), zero off the mask.
        Memory: one buffer of (out, in), a boolean one and a few of (out, block_size); while factorising one of
        (in, in) in float64, and one in the dtype of the Gram matrix, which the problem keeps.

    Raises:
        ShapeError: the shapes do not belong together, or in is not a multiple of m.
        ConfigError: `block_size` is below 1.
        NumericalError: the weight holds NaN or infinite values, or H cannot be factorised.

    Inputs 0 and 1 are the same, so one of them can do the work of both:

    >>> gram = torch.eye(4)
    >>> gram[0, 1] = gram[1, 0] = 1
    >>> mask, pruned = sparsegpt(torch.tensor([[1.0, 2, 3, 0.5]]), Problem(gram, 1e-6), NMPattern(2, 4))
    >>> mask.int(), pruned.round(decimals=4)
    (tensor([[0, 1, 1, 0]], dtype=torch.int32), tensor([[0., 3., 3., 0.]]))
    """
    problem.check(weight)
    m, columns = pattern.m, weight.shape[1]
    if columns % m:
        raise ShapeError(f"weight has in={columns}, which is not a multiple of m={m}")
    if block_size < 1:
        raise ConfigError(f"block_size={block_size} is not a number of columns; use 1 or more")
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("weight holds NaN or infinite values; look for them in the checkpoint")

    choose = choose or (lambda saliency: topn_mask(saliency, pattern))
    factor = problem.inverse_factor.to(weight.dtype)
    pruned = weight.masked_fill(problem.gram.diagonal() == 0, 0)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    width = -(-block_size // m) * m
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block = pruned[:, start:stop].t().contiguous()  # (in, out): a column is in one place
        local = factor[start:stop, start:stop]
        scale = local.diagonal()
        weighing = scale.amin() / scale  # relative, so that the squares of small inputs do not vanish
        errors = torch.empty_like(block)
        for j in range(0, stop - start, m):
            end = j + m
            kept = choose((block[j:end].t() * weighing[j:end]).square())
            mask[:, start + j : start + end] = kept
            for i, chosen in enumerate(kept.t(), j):
                # A weight that is kept has no error, one that goes is its own error.
                errors[i] = torch.where(chosen, 0, block[i] / scale[i])
                block[i + 1 : end].addr_(local[i, i + 1 : end], errors[i], alpha=-1)
            block[end:].addmm_(local[j:end, end:].t(), errors[j:end], alpha=-1)
        pruned[:, start:stop] = block.t() * mask[:, start:stop]
        pruned[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return mask, pruned
