"""Better masks for weights that stay as they are: swaps within groups, against the exact output error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError, ShapeError
from ..pattern import NMPattern
from .checks import check_mask
from .expander import bands

_BLOCK = 128  # columns after which the gradient of all others is brought up to date


def swap_mask(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    pattern: NMPattern,
    min_degree: int = 0,
    band: int = 16,
    rounds: int = 20,
) -> Tensor:
    """Lower ‖(W − W∘K)X‖²_F by swapping kept weights for pruned ones of the same row and group (SparseSwaps).

    After arXiv 2512.10922. With r = w∘(1 − k), what a row has lost, and c = XXᵀ r, pruning u and restoring p changes
    the row's error by exactly

        Δ = 2 w_u c_u + w_u² G_uu − 2 w_p c_p + w_p² G_pp − 2 w_u w_p G_up,   G = XXᵀ.

    A round goes through the groups from left to right; in each, every row makes its best swap, if that has Δ < 0. So
    the objective never rises, and what no round changes any more cannot be improved by one swap in any group.

    Under a floor, a column that is at it loses nothing, and of the rows of a band that want to drop a column with a
    surplus of s, the s with the most to gain do.

    Args:
        weight: W (out, in), float32 or float64. It stays as it is.
        mask: K (out, in), boolean, n kept in every group, with the floor if there is one.
        gram: XXᵀ (in, in), summed over the calibration tokens, not damped, in the dtype of `weight`.
        pattern: n kept of every m inputs.
        min_degree: The floor B: every input keeps at least so many outputs of every band. 0 for none.
        band: Number of rows over which the floor holds; bands are cut as in `expander_mask`.
        rounds: Largest number of rounds. A round that changes nothing is the last.

    Returns:
        A new boolean mask (out, in). A round costs about one product with the Gram matrix. Memory: three buffers of
        (out, in) and a boolean one, a few of (out, 128), and two of (out, m²).

    Raises:
        ShapeError: the shapes do not belong together, in is not a multiple of m, the mask is not boolean, or a group
            does not keep exactly n.
        ConfigError: the floor cannot hold, or does not hold in `mask`.
        NumericalError: the weight or the Gram matrix holds NaN or infinite values.

    Inputs 2 and 3 are the same, and losing both costs (1.6 + 1.5)² = 9.61. Giving up 1 for 2 makes it 1.9² + 1.5²:

    >>> gram = torch.eye(4)
    >>> gram[2, 3] = gram[3, 2] = 1
    >>> mask = torch.tensor([[True, True, False, False]])
    >>> swap_mask(torch.tensor([[2.0, 1.9, 1.6, 1.5]]), mask, gram, NMPattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    if weight.dim() != 2 or mask.shape != weight.shape or gram.shape != (weight.shape[1],) * 2:
        raise ShapeError(
            f"weight {tuple(weight.shape)}, mask {tuple(mask.shape)} and gram {tuple(gram.shape)} do not belong "
            "together; they must be (out, in), (out, in) and (in, in)"
        )
    check_mask(mask, pattern, min_degree, band)
    floor = _Floor(mask, min_degree, band) if min_degree else None
    mask, m, columns = mask.clone(), pattern.m, weight.shape[1]
    gradient = (weight * ~mask) @ gram  # c, of every row
    if not bool(torch.isfinite(gradient).all()):
        raise NumericalError(
            "weight or gram holds NaN or infinite values; look for them in the checkpoint and the data"
        )
    energy = weight.square() * gram.diagonal()  # w_j² G_jj
    # How far Δ may be off by rounding: |c_j| is a sum of terms of at most √G_jj · √(w_k² G_kk) (Cauchy-Schwarz). A swap
    # that gains less than that may be a loss, and could be undone and done again for ever.
    root = energy.sqrt()
    slack = 2 * torch.finfo(weight.dtype).eps * root.sum(1, keepdim=True)

    width = -(-_BLOCK // m) * m
    for _ in range(rounds):
        swapped = False
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            local, moved = gradient[:, block].clone(), torch.zeros_like(gradient[:, block])
            for left in range(start, block.stop, m):
                group, inner = slice(left, left + m), slice(left - start, left - start + m)
                w, kept = weight[:, group], mask[:, group]
                cross, square, doubt = 2 * w * local[:, inner], energy[:, group], slack * root[:, group]
                lose = (square + cross + doubt).masked_fill_(~kept, torch.inf)
                win = (square - cross + doubt).masked_fill_(kept, torch.inf)
                if floor:
                    lose.masked_fill_(floor.tight(kept), torch.inf)
                change = lose[:, :, None] + win[:, None, :]
                change.addcmul_(w[:, :, None] * gram[group, group], w[:, None, :], value=-2)
                best, pair = change.flatten(1).min(1)
                rows = (best < 0).nonzero().flatten()
                if floor:
                    rows = floor.allow(rows, pair[rows] // m, best[rows], kept)
                if not len(rows):
                    continue
                swapped = True
                u, p = pair[rows] // m, pair[rows] % m
                kept[rows, u], kept[rows, p] = False, True
                step = moved[:, inner]
                step[rows, u], step[rows, p] = w[rows, u], -w[rows, p]
                local.addmm_(step, gram[group, block])
            gradient.addmm_(moved, gram[block])
        if not swapped:
            break
    return mask


class _Floor:
    """At least `min_degree` kept in every column of every band, for one group of columns at a time."""

    def __init__(self, mask: Tensor, min_degree: int, band: int) -> None:
        self.min_degree = min_degree
        self.stretches = bands(len(mask), band)
        heights = [height for start, stop, height in self.stretches for _ in range(start, stop, height)]
        number = torch.arange(len(heights), device=mask.device)
        self.band_of = number.repeat_interleave(torch.tensor(heights, dtype=torch.long, device=mask.device))

    def surplus(self, kept: Tensor) -> Tensor:
        """How many each column of each band keeps above the floor. kept (out, k), boolean. Returns (bands, k)."""
        degrees = [kept[start:stop].unflatten(0, (-1, height)).sum(1) for start, stop, height in self.stretches]
        return torch.cat(degrees) - self.min_degree if degrees else kept.long()

    def tight(self, kept: Tensor) -> Tensor:
        """Whether a row's band can give up nothing in a column. kept (out, k), boolean. Returns (out, k)."""
        return (self.surplus(kept) == 0)[self.band_of]

    def allow(self, rows: Tensor, column: Tensor, change: Tensor, kept: Tensor) -> Tensor:
        """Those of `rows` that may all give up their `column` at once: the ones with the lowest `change` of each band.

        rows, column and change (count,); kept (out, k), boolean.
        """
        surplus = self.surplus(kept)
        place = self.band_of[rows] * surplus.shape[1] + column
        surplus = surplus.flatten()
        demand = torch.bincount(place, minlength=len(surplus))
        if bool((demand <= surplus).all()):
            return rows
        order = change.argsort()
        order = order[place[order].argsort(stable=True)]  # by place, and by change within a place
        place = place[order]
        rank = torch.arange(len(rows), device=rows.device) - (demand.cumsum(0) - demand)[place]
        return rows[order[rank < surplus[place]]]
