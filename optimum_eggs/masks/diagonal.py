"""The published degree floor: whole wrapped diagonals of m x m tiles are kept."""

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pattern import NMPattern
from .topn import check_score


def diagonal_mask(score: Tensor, pattern: NMPattern, min_degree: int = 1) -> Tensor:
    """Keep the `min_degree` best wrapped diagonals of every m x m tile, then fill each row by score.

    The diagonal selection of EGGS-PTP (Bazarbachi, Sun and Shen, https://arxiv.org/abs/2508.09471). Diagonal k of a
    tile holds the entries (i, (i + k) mod m); the diagonals with the largest sum of scores are kept whole, so every
    input keeps at least `min_degree` outputs of each m rows. Rows beyond the last full tile get the same choice on
    what there is of their tile, without a floor.

    score (out, in). Returns a boolean mask (out, in).

    Raises:
        ConfigError: `min_degree` is not between 0 and n.
        ShapeError, NumericalError: as `topn_mask`.
    """
    check_score(score, pattern)
    if not 0 <= min_degree <= pattern.n:
        raise ConfigError(
            f"min_degree={min_degree} with diagonals at {pattern}: a row keeps one weight of each diagonal and n in "
            f"all, so use a value between 0 and {pattern.n}"
        )
    rows, m = score.shape[0], pattern.m
    padded = torch.nn.functional.pad(score, (0, 0, 0, -rows % m))
    tiles = padded.unflatten(0, (-1, m)).unflatten(2, (-1, m)).transpose(1, 2)  # (bands, groups, m rows, m columns)
    row = torch.arange(m, device=score.device)
    column = (row[:, None] + row) % m  # column[i, k]: where diagonal k crosses row i
    diagonals = tiles.gather(3, column.expand_as(tiles))  # (bands, groups, m rows, m diagonals)
    best = diagonals.sum(2).topk(min_degree, dim=-1).indices  # (bands, groups, min_degree)
    forced = torch.zeros_like(tiles, dtype=torch.bool)
    forced.scatter_(3, (row[:, None] + best[:, :, None, :]) % m, True)
    # An order, not a sum: adding a large bonus to the score would lose its low bits.
    by_score = tiles.argsort(dim=3, descending=True, stable=True)
    forced_first = forced.gather(3, by_score).to(torch.uint8).argsort(dim=3, descending=True, stable=True)
    kept = by_score.gather(3, forced_first)[..., : pattern.n]
    mask = torch.zeros_like(forced).scatter_(3, kept, True)
    return mask.transpose(1, 2).flatten(2).flatten(0, 1)[:rows]
