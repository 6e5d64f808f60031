"""The optimal N:M mask under a floor on the degree of every input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pattern import NMPattern
from .topn import topn_mask

_CHUNK = 1 << 18  # numbers in the largest intermediate of one chunk of tiles: 2 MiB in float64, to stay in cache
_CHUNK_ELSEWHERE = 1 << 25  # the same where it is no cache that counts, but launches


def expander_mask(score: Tensor, pattern: NMPattern, min_degree: int = 1, band: int = 16) -> Tensor:
    """The N:M mask of largest total score in which every input keeps `min_degree` outputs of every `band` rows.

    Maximise Σ score∘mask over binary masks with n kept in each row's group and at least `min_degree` kept in each
    column of each band. This is a transportation problem, so the best binary mask is also the best fractional one.
    It is solved exactly by successive shortest paths (Ahuja, Magnanti and Orlin, *Network Flows*, 1993, section 9.7):
    start from the row-wise top-n, which is the optimum without a floor; while a column is short, find the cheapest
    chain of one-for-one swaps within rows that leads to it from a column with a surplus, and apply it.

    Rows are cut into `out // band` bands; the last one takes the remainder, and a matrix of fewer rows than `band` is
    one band. All bands and groups are solved at once; those that the top-n already satisfies cost nothing more.
    Memory: a few boolean buffers of (out, in); the tiles that fall short are solved a few megabytes at a time.

    Args:
        score: (out, in), finite.
        pattern: n kept of every m inputs.
        min_degree: The floor B, at least 0.
        band: Number of rows over which the floor holds, at least 1.

    Returns:
        A boolean mask (out, in).

    Raises:
        ConfigError: the floor cannot hold: m·min_degree kept weights are asked of a band that keeps rows·n.
        ShapeError, NumericalError: as `topn_mask`.

    >>> expander_mask(torch.tensor([[9.0, 8, 1, 2], [9, 8, 1, 3]]), NMPattern(2, 4), min_degree=1, band=2).int()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    mask = topn_mask(score, pattern)  # which checks the score
    check_floor(score.shape[0], pattern, min_degree, band)
    if min_degree == 0 or mask.numel() == 0:
        return mask
    for start, stop, height in bands(score.shape[0], band):
        part = score[start:stop].unflatten(0, (-1, height)).unflatten(2, (-1, pattern.m)).transpose(1, 2)
        kept = mask[start:stop].unflatten(0, (-1, height)).unflatten(2, (-1, pattern.m)).transpose(1, 2)
        degree = kept.sum(2, dtype=torch.int32)  # several times faster than in the default int64
        short = (degree < min_degree).any(-1)  # (bands, groups)
        if bool(short.any()):
            chunk = _CHUNK if score.device.type == "cpu" else _CHUNK_ELSEWHERE
            size = max(1, chunk // (height * pattern.m**2))
            solved = [
                _raise_short_columns(tiles.double(), chosen, min_degree)
                for tiles, chosen in zip(part[short].split(size), kept[short].split(size), strict=True)
            ]
            kept[short] = torch.cat(solved)
    return mask


def bands(rows: int, band: int) -> list[tuple[int, int, int]]:
    """Cut `rows` into bands: (start, stop, height) of one or two stretches of bands of equal height.

    >>> bands(40, 16)
    [(0, 16, 16), (16, 40, 24)]
    >>> bands(32, 16), bands(10, 16)
    ([(0, 32, 16)], [(0, 10, 10)])
    """
    if rows % band == 0:
        return [(0, rows, band)] if rows else []
    last = max(0, rows // band - 1) * band
    stretches = [(0, last, band), (last, rows, rows - last)]
    return [stretch for stretch in stretches if stretch[0] < stretch[1]]


def check_floor(rows: int, pattern: NMPattern, min_degree: int, band: int) -> None:
    """Raise unless a floor of `min_degree` per `band` rows can hold on a matrix of `rows` rows.

    Raises:
        ConfigError: a value is out of range, or the smallest band keeps too few weights.
    """
    if min_degree < 0:
        raise ConfigError(f"min_degree={min_degree} is negative; use 0 for no floor")
    if band < 1:
        raise ConfigError(f"band={band} is not a number of rows; use 1 or more")
    height = min(rows, band)
    if height and height * pattern.n < min_degree * pattern.m:
        need = -(-min_degree * pattern.m // pattern.n)
        raise ConfigError(
            f"min_degree={min_degree} cannot hold at {pattern}: {height} rows keep {height * pattern.n} weights a "
            f"group, and {pattern.m} inputs need {min_degree} each; use a band of {need} rows or more (and a layer "
            "that has them), a smaller min_degree, or add the layer to `ignore`"
        )


def _raise_short_columns(score: Tensor, mask: Tensor, min_degree: int) -> Tensor:
    """Bring every column of every tile up to `min_degree`, at the least loss.

    score (tiles, rows, m), float64; mask (tiles, rows, m), n kept in each row and optimal for the degrees it has.
    Each round adds one to a short column of every tile that has one: the chain of swaps found is a shortest path in
    the residual graph, so the mask stays optimal for its new degrees.
    """
    mask = mask.clone()
    m = mask.shape[-1]
    # Below this a path is not cheaper but rounded: without it, rounding could walk in a circle.
    slack = 1e-12 * score.abs().amax((1, 2)).clamp_min(torch.finfo(score.dtype).tiny)
    active = torch.arange(mask.shape[0], device=mask.device)
    while True:
        degree = mask[active].sum(1)  # (tiles, m)
        unfinished = (degree < min_degree).any(-1)
        if not bool(unfinished.any()):
            return mask
        active, degree = active[unfinished], degree[unfinished]
        tile = torch.arange(len(active), device=mask.device)
        kept, value = mask[active], score[active]

        # cost[a, b]: the least loss of a row that gives up column a (kept) for column b (not kept), and that row.
        give = torch.where(kept, value, torch.inf).transpose(1, 2).contiguous()
        take = torch.where(kept, -torch.inf, value).transpose(1, 2).contiguous()
        cost, row = (give[:, :, None, :] - take[:, None, :, :]).min(-1)

        target = degree.argmin(-1)  # the shortest column
        surplus = degree > min_degree
        distance = torch.full((len(active), m), torch.inf, dtype=score.dtype, device=score.device)
        distance[tile, target] = 0.0
        towards = target[:, None].repeat(1, m)  # next column on the way from each column to the target
        for _ in range(m - 1):  # Bellman-Ford: costs may be negative, cycles are not
            through = cost + distance[:, None, :]
            best, following = through.min(-1)
            better = best < distance - slack[active, None]
            if not bool(better.any()):
                break
            distance = torch.where(better, best, distance)
            towards = torch.where(better, following, towards)

        here = torch.where(surplus, distance, torch.inf).argmin(-1)
        for _ in range(m - 1):
            moving = here != target
            if not bool(moving.any()):
                break
            following = towards[tile, here]
            index, line = active[moving], row[tile, here, following][moving]
            mask[index, line, here[moving]] = False
            mask[index, line, following[moving]] = True
            here = torch.where(moving, following, here)
