"""The plain N:M mask: the n largest of every m."""

import torch
from torch import Tensor

from ..errors import NumericalError, ShapeError
from ..ops import native
from ..ops.watch import nothing_watches
from ..pattern import NMPattern


def check_score(score: Tensor, pattern: NMPattern) -> None:
    """Raise unless `score` is a finite (out, in) matrix whose in is a multiple of m.

    Raises:
        ShapeError: wrong number of dimensions, or in is not a multiple of m.
        NumericalError: a score is NaN or infinite.
    """
    if score.dim() != 2:
        raise ShapeError(f"score has shape {tuple(score.shape)}; it must be (out, in)")
    if score.shape[1] % pattern.m:
        raise ShapeError(f"score has in={score.shape[1]}, which is not a multiple of m={pattern.m}")
    # NaN goes through aminmax; a GPU is waited for once
    if score.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(score.detach()))).all()):
        raise NumericalError("score holds NaN or infinite values; look for them in the weight and the statistics")


def topn_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Keep the n largest scores of every m consecutive inputs, in every row.

    score (out, in). Returns a boolean mask (out, in). Among equal scores any n may be kept.

    Raises:
        ShapeError, NumericalError: as [`check_score`].

    >>> topn_mask(torch.tensor([[3.0, 1.0, 4.0, 1.5]]), NMPattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    check_score(score, pattern)
    groups = score.unflatten(1, (-1, pattern.m))
    if pattern.m > native.MOST_COMPARED:  # up to there, comparing every pair is several times faster than a top-k
        kept = groups.topk(pattern.n, dim=-1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)
    if score.dtype is torch.float32 and score.device.type == "cpu" and native.missing is None:
        score = score.detach().resolve_neg().contiguous()
        if nothing_watches(score):
            return native.topn(score, pattern.n, pattern.m)
    places = groups.flatten(0, 1).t().contiguous()  # (m, groups)
    larger = torch.zeros(places.shape, dtype=torch.uint8, device=score.device)  # of the others in the group
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            first = places[i] >= places[j]
            larger[j] += first
            larger[i] += ~first
    return (larger < pattern.n).t().contiguous().view(score.shape)
