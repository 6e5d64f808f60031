"""Factors of large matrices, in place, the work shared out over the processes that have the same matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import Ranks

_COLUMNS = 256  # that are found at a time


def cholesky(matrix: Tensor, ranks: Ranks) -> Tensor:
    """L (in, in), lower triangular with LLᵀ equal to a symmetric matrix, in its place; zeros above.

    Each process finds some of its columns and brings those on its part of what is left to factorise, so that what comes
    out has the same bits in all of them.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    lower = matrix.t()  # LAPACK's order, so that nothing is copied
    if ranks.size == 1:
        return torch.linalg.cholesky(lower, out=lower)
    starts = range(0, len(lower), _COLUMNS)
    owners = [number % ranks.size for number in range(len(starts))]
    for number, start in enumerate(starts):
        columns, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        if owners[number] == ranks.rank:
            first, rest = lower[columns, columns], lower[behind, columns]
            first.copy_(torch.linalg.cholesky(first))
            rest.copy_(torch.linalg.solve_triangular(first.t(), rest, upper=True, left=False))
        sent = lower[start:, columns].contiguous()  # before they meet: memory that is out after that is told to no one
        ranks.agree(None)  # that it could
        ranks.copy_from(owners[number], sent)
        lower[start:, columns] = sent
        lower[:start, columns] = 0
        for later, owner in zip(starts[number + 1 :], owners[number + 1 :], strict=True):
            if owner == ranks.rank:
                own = slice(later, later + _COLUMNS)
                lower[later:, own].addmm_(lower[later:, columns], lower[own, columns].t(), alpha=-1)
    return lower


def invert(lower: Tensor, ranks: Ranks) -> Tensor:
    """Invert a lower triangular matrix (in, in) in place, its columns shared out over the processes."""
    starts = range(0, len(lower), _COLUMNS)
    owners = ranks.deal({str(start): (len(lower) - start) ** 2 for start in starts})
    for start in starts:
        if owners[str(start)] == ranks.rank:
            _invert_columns(lower, slice(start, start + _COLUMNS))
    if ranks.size == 1:
        return lower
    buffer = lower.new_empty(min(_COLUMNS, len(lower)) * len(lower))  # before they meet, as above
    ranks.agree(None)  # that all of them could
    for start in starts:
        columns = lower[start:, start : start + _COLUMNS]
        sent = buffer[: columns.numel()].view(columns.shape).copy_(columns)
        ranks.copy_from(owners[str(start)], sent)
        columns.copy_(sent)
    return lower


def _invert_columns(lower: Tensor, columns: slice) -> None:
    """Put these columns of the inverse of a lower triangular matrix in their place; none to the left is read.

    By forward substitution of one block of rows after the other. `solve_triangular` would do it at once, and copy the
    part of the matrix that it reads.
    """
    first = lower[columns, columns]
    eye = torch.eye(len(first), dtype=first.dtype, device=first.device)
    first.copy_(torch.linalg.solve_triangular(first, eye, upper=False))
    rest = lower[columns.stop :, columns]
    rest.copy_(torch.mm(rest, first).neg_())
    for top in range(columns.stop, len(lower), _COLUMNS):
        rows, below = slice(top, top + _COLUMNS), slice(top + _COLUMNS, None)
        part = lower[rows, columns]
        part.copy_(torch.linalg.solve_triangular(lower[rows, rows], part, upper=False))
        lower[below, columns].addmm_(lower[below, rows], part, alpha=-1)
