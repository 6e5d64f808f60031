"""The order of a layer's inputs: which of them share a group of m."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import NMPattern
from .topn import check_score

_TOGETHER = 512  # groups of one assignment: its time grows with the third power
_LEVELS = 8
_NUMBERS = 1 << 18  # of what is made at a time on a CPU, to stay in its cache


def channel_order(score: Tensor, pattern: NMPattern, rounds: int = 3) -> Tensor:
    """An order of the inputs in which the row-wise n largest of every m keep more score.

    The heuristic of RIA (Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF). Inputs are sorted by
    their total score and dealt out, so that every group gets inputs of every level. Then one input is taken out of
    each group, and these are given back to the groups at the largest total, a linear assignment: to a group whose
    other m − 1 inputs have the n-th largest score t_i in row i, input j adds Σ_i max(0, s_ij − t_i), since where it is
    larger it takes that one's place. A round takes out each of a group's m inputs once, from at most 512 groups at a
    time, drawn anew each time: the time of an assignment grows with the third power of their number, this way that of
    all of them with the width. No assignment lowers the total. Between rounds every group shuffles the positions of its
    inputs, or two of one level could never meet.

    The same score gives the same order. Time: rounds · 2^12 · out · in multiplications, and rounds · in/512 assignments
    of 512 groups. Memory: two buffers of (out, in) and 16 + n of (512, out).

    Args:
        score: (out, in), finite, larger = keep.
        pattern: n kept of every m inputs.
        rounds: Number of rounds. Each gains less than the one before.

    Returns:
        (in,), int64: group g of `score[:, order]` holds the inputs `order[g * m : (g + 1) * m]`. The identity, unless
        another order keeps more.

    Raises:
        ShapeError, NumericalError: as `topn_mask`.

    >>> channel_order(torch.tensor([[9.0, 8, 1, 2], [9, 7, 2, 1]]), NMPattern(1, 2))
    tensor([0, 2, 1, 3])
    """
    check_score(score, pattern)
    identity = torch.arange(score.shape[1], device=score.device)
    if score.shape[0] == 0 or score.shape[1] <= pattern.m:
        return identity
    # (in, out): an input's scores lie together; float32 at least, since thousands of them are added up
    columns = score.to(torch.promote_types(score.dtype, torch.float32)).t().contiguous()
    groups = _dealt(columns, pattern.m)
    generator = torch.Generator().manual_seed(0)  # on the CPU: every device draws the same
    parts = -(-len(groups) // _TOGETHER)
    for _ in range(rounds):
        for position in range(pattern.m):
            for some in torch.randperm(len(groups), generator=generator).tensor_split(parts):
                chosen = groups[some.to(groups.device)]
                groups[some, position] = _reassigned(columns, chosen, position, pattern.n)
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1).to(groups.device))
    groups = groups.sort(1).values
    order = groups[groups[:, 0].argsort()].flatten()
    return order if kept_score(score[:, order], pattern) > kept_score(score, pattern) else identity


def kept_score(score: Tensor, pattern: NMPattern) -> float:
    """The total that the row-wise n largest of every m keep, in float64. score (out, in).

    Raises:
        ShapeError, NumericalError: as `topn_mask`.

    >>> kept_score(torch.tensor([[3.0, 1.0, 4.0, 1.5]]), NMPattern(2, 4))
    7.0
    """
    check_score(score, pattern)
    kept = score.unflatten(1, (-1, pattern.m)).topk(pattern.n, dim=-1).values
    return float(kept.sum(dtype=torch.float64))


def _dealt(columns: Tensor, m: int) -> Tensor:
    """Inputs in groups (in/m, m): the k-th of a group is of the k-th level of total score. columns (in, out)."""
    ranked = columns.sum(1, dtype=torch.float64).argsort(descending=True, stable=True)
    return ranked.view(m, -1).t().contiguous()


def _reassigned(columns: Tensor, groups: Tensor, position: int, n: int) -> Tensor:
    """The inputs at `position` of each group, (groups,), given back to these groups at the largest total score."""
    from scipy.optimize import linear_sum_assignment

    free = groups[:, position]
    others = torch.cat([groups[:, :position], groups[:, position + 1 :]], 1)
    threshold = _nth_largest(columns, others, n)
    gain = _gains(columns[free], threshold)
    _, chosen = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    given = free[torch.from_numpy(chosen).to(free.device)]
    # the gains are near ones, and no assignment is to lower the total
    before, after = ((columns[each] - threshold).clamp_min_(0).sum(dtype=torch.float64) for each in (free, given))
    return given if after > before else free


def _nth_largest(columns: Tensor, inputs: Tensor, n: int) -> Tensor:
    """The n-th largest of some inputs in every row: columns (in, out), inputs (groups, some), to (groups, out)."""
    largest = [columns.new_full((len(inputs), columns.shape[1]), -torch.inf) for _ in range(n)]
    for some in inputs.unbind(1):
        value = columns[some]
        for i, held in enumerate(largest):  # a value goes to its place, and the smaller ones move on
            largest[i], value = torch.maximum(held, value), torch.minimum(held, value)
    return largest[-1]


def _gains(score: Tensor, threshold: Tensor) -> Tensor:
    """Σ_i max(0, s_ji − t_gi), nearly, for every input j and group g: (groups, inputs), as one product of matrices.

    For a fixed s, max(0, s − t) is a convex function of t, and is taken as straight between levels: row i has eight of
    them, evenly spaced over its thresholds. That is exact where s and t do not lie between the same two levels.

    score s (inputs, out); threshold t (groups, out).
    """
    low, high = threshold.amin(0), threshold.amax(0)
    step = ((high - low) / (_LEVELS - 1)).clamp_min(torch.finfo(score.dtype).tiny)
    level = torch.arange(_LEVELS, device=score.device, dtype=score.dtype)[:, None]
    levels = low + step * level
    share, above = (score.new_empty(len(each), _LEVELS, score.shape[1]) for each in (threshold, score))
    height = max(1, _NUMBERS // levels.numel()) if score.device.type == "cpu" else len(score)
    for start in range(0, len(score), height):
        some = slice(start, start + height)
        place = ((threshold[some] - low) / step)[:, None]
        torch.sub(place, level, out=share[some]).abs_().neg_().add_(1).clamp_min_(0)  # of each level in a threshold
        torch.sub(score[some, None], levels, out=above[some]).clamp_min_(0)
    return share.flatten(1) @ above.flatten(1).t()
