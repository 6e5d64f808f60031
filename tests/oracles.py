"""Slow and obvious references: plain loops, enumeration, or a solver that knows nothing of this package."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import settings
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

PATTERNS = [(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m)]
"""Every legal (n, m)."""

checked = settings(deadline=None, derandomize=True)
"""How properties are checked: the same examples on every run, no time limit for a single one.

How many there are is for the profile to say: `quick` unless `--hypothesis-profile ci` is given, see `conftest.py`.
"""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def whole_numbers(rows: int, columns: int, below: int, seed: int = 0) -> Tensor:
    """Integers as float64: their sums are exact, so totals can be compared for equality."""
    return torch.randint(below, (rows, columns), generator=generator(seed)).double()


def random_mask(rows: int, columns: int, n: int, m: int, seed: int = 0) -> Tensor:
    """A legal n:m mask."""
    return loop_topn(torch.rand(rows, columns, generator=generator(seed)), n, m)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two float tensors are equal bit for bit, signs of zeros included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    kind = _BITS[left.element_size()]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def total(score: Tensor, mask: Tensor) -> float:
    """Sum of the scores kept, in float64."""
    return float(score.double()[mask].sum())


def is_legal(mask: Tensor, n: int, m: int) -> bool:
    """Whether every group of every row keeps exactly n."""
    return all(sum(row[start : start + m]) == n for row in mask.int().tolist() for start in range(0, mask.shape[1], m))


def loop_topn(score: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m, row by row."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), m):
            for j in sorted(range(start, start + m), key=lambda j: row[j], reverse=True)[:n]:
                mask[i, j] = True
    return mask


def loop_diagonal(score: Tensor, n: int, m: int, min_degree: int) -> Tensor:
    """The best wrapped diagonals of every m x m tile (the last may have fewer rows), then each row filled by score."""
    rows, columns = score.shape
    value = score.tolist()
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for top in range(0, rows, m):
        lines = range(top, min(top + m, rows))
        for start in range(0, columns, m):
            crossing = {k: {i: start + (i - top + k) % m for i in lines} for k in range(m)}
            sums = {k: sum(value[i][crossing[k][i]] for i in lines) for k in range(m)}
            best = sorted(sums, key=lambda k: sums[k], reverse=True)[:min_degree]
            for i in lines:
                forced = [crossing[k][i] for k in best]
                others = sorted(set(range(start, start + m)) - set(forced), key=lambda j: value[i][j], reverse=True)
                for j in forced + others[: n - min_degree]:
                    mask[i, j] = True
    return mask


def cut(rows: int, band: int) -> list[tuple[int, int]]:
    """(start, stop) of `rows // band` bands, the last of which takes the remainder; at least one."""
    count = max(1, rows // band)
    return [(k * band, rows if k == count - 1 else (k + 1) * band) for k in range(count)]


def loop_floor(mask: Tensor, band: int) -> int:
    """The least number of outputs that an input keeps in a band."""
    kept = mask.int().tolist()
    return min(
        sum(kept[i][j] for i in range(start, stop)) for start, stop in cut(len(kept), band) for j in range(len(kept[0]))
    )


def exact_floor_total(tile_score: Tensor, n: int, min_degree: int) -> float:
    """The largest total of one tile (rows, m): n kept in each row, `min_degree` or more in each column."""
    rows, m = tile_score.shape
    row_sums = np.kron(np.eye(rows), np.ones(m))
    column_sums = np.kron(np.ones(rows), np.eye(m))
    found = milp(
        -tile_score.double().numpy().reshape(-1),
        integrality=np.ones(rows * m),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(row_sums, n, n), LinearConstraint(column_sums, min_degree, np.inf)],
        options={"mip_rel_gap": 0},
    )
    assert found.success, found.message
    return total(tile_score, torch.from_numpy(found.x.round() == 1).view(rows, m))


def exact_total(score: Tensor, n: int, m: int, min_degree: int, band: int) -> float:
    """The same for a whole matrix, band by band and group by group."""
    return sum(
        exact_floor_total(score[start:stop, left : left + m], n, min_degree)
        for start, stop in cut(len(score), band)
        for left in range(0, score.shape[1], m)
    )


def all_legal_tiles(n: int, m: int, band: int, min_degree: int) -> Tensor:
    """Every tile (count, band, m) that keeps n in each row and `min_degree` or more in each column."""
    lines = [[j in kept for j in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = torch.tensor(list(itertools.product(lines, repeat=band)))
    return tiles[(tiles.sum(1) >= min_degree).all(1)]


def loop_wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    norm = input_norm.tolist()
    return torch.tensor([[abs(w) * norm[j] for j, w in enumerate(row)] for row in weight.tolist()], dtype=torch.float64)


def loop_ria(weight: Tensor, input_norm: Tensor, exponent: float) -> Tensor:
    size = [[abs(w) for w in row] for row in weight.tolist()]
    row_sum = [sum(row) for row in size]
    column_sum = [sum(column) for column in zip(*size, strict=True)]
    norm = input_norm.tolist()
    return torch.tensor(
        [
            [(w / row_sum[i] + w / column_sum[j]) * norm[j] ** exponent for j, w in enumerate(row)]
            for i, row in enumerate(size)
        ],
        dtype=torch.float64,
    )


def loop_pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values kept, in order, and the bits: position 8b + i is bit i of byte b."""
    values, meta = [], []
    for line, kept in zip(weight, mask.tolist(), strict=True):
        values.append(torch.stack([line[j] for j, keep in enumerate(kept) if keep]))
        packed = [0] * -(-len(kept) // 8)
        for j, keep in enumerate(kept):
            packed[j // 8] |= int(keep) << (j % 8)
        meta.append(packed)
    return torch.stack(values), torch.tensor(meta, dtype=torch.uint8)


def damped_gram(gram: Tensor, damping: float) -> Tensor:
    """XXᵀ + λI in float64, λ = damping · mean(diag XXᵀ)."""
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def dense_refit(weight: Tensor, mask: Tensor, gram: Tensor, damping: float) -> Tensor:
    """The exact minimiser of (w − z)(XXᵀ + λI)(w − z)ᵀ over z on the support, row by row, in float64."""
    damped = damped_gram(gram, damping)
    solution = torch.zeros(weight.shape, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        support = mask[i].nonzero().flatten()
        solution[i, support] = torch.linalg.solve(damped[support][:, support], (damped @ row)[support])
    return solution


def refit_objective(weight: Tensor, pruned: Tensor, gram: Tensor, damping: float) -> float:
    """‖(W − Z)X‖² + λ‖W − Z‖², in float64."""
    difference = (weight - pruned).double()
    return float(((difference @ damped_gram(gram, damping)) * difference).sum())


def dense_sigma2(adjacency: Tensor) -> float:
    """Second singular value of D_out^-½ A D_in^-½ by a full SVD in float64; nodes without edges are left out."""
    edges = adjacency.double()
    edges = edges[edges.sum(1) > 0][:, edges.sum(0) > 0]
    scaled = edges / edges.sum(1, keepdim=True).sqrt() / edges.sum(0).sqrt()
    return float(torch.linalg.svdvals(scaled)[1])


def coded_product(x, codes, scale, weight_meta, bias, n, m, kind, group):
    """What a layer of integers gives for few tokens: inputs rounded to bytes, group by group, and exact products."""
    rows, columns = len(codes), x.shape[-1]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if weight_meta is not None:
        bits = [[byte >> i & 1 for byte in line for i in range(8)] for line in weight_meta.tolist()]
        mask = torch.tensor(bits, dtype=torch.bool)[:, :columns]
    numbers = codes.long() if kind == "int8" else torch.stack([codes & 15, codes >> 4], -1).flatten(1).long() - 8
    spread = scale.double().repeat_interleave(group, 1)[:, :columns]
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    weight[mask] = numbers[:, : columns // m * n].flatten().double()
    inputs = torch.nn.functional.pad(x.double().reshape(-1, columns), (0, -columns % group)).unflatten(1, (-1, group))
    step = inputs.abs().amax(2, keepdim=True) / 127
    inputs = (inputs / torch.where(step == 0, 1, step)).round() * step
    y = inputs.flatten(1)[:, :columns] @ (weight * spread).t()
    y = y if bias is None else y + bias.double()
    return y.to(x.dtype).view(*x.shape[:-1], rows)
