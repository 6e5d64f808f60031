"""Group coordinate descent: the best support and the best values of one group of inputs after the other."""

from __future__ import annotations

import itertools
from math import comb

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..masks.checks import check_mask
from ..masks.expander import bands
from ..pattern import NMPattern
from .objective import check_problem, damped_gram
from .refit import masked_refit

MAX_SUPPORTS = 128
"""The most supports of a group that are enumerated: every pattern up to m = 8, and sparse or dense ones above."""

_BLOCK = 64  # columns whose gradient is kept up to date at once
_SETTLED = 1e-3  # the share of groups that must change for another sweep to pay


def coordinate_descent(
    weight: Tensor,
    start: Tensor,
    mask: Tensor,
    gram: Tensor,
    pattern: NMPattern,
    min_degree: int = 0,
    band: int = 16,
    damping: float = 0.01,
    sweeps: int = 4,
    refit_steps: int = 10,
) -> tuple[Tensor, Tensor]:
    """Lower f(Z) = ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over Z and its N:M mask, λ = damping · mean(diag XXᵀ).

    For one group I of m inputs, and all rows at once, with H = XXᵀ + λI and everything else fixed: the optimum on the
    support S is z_S = H_SS⁻¹ g_S with g = ((W − Z)H)_I + Z_I H_II, and it gains g_Sᵀ H_SS⁻¹ g_S. All supports are
    tried and the best is taken. Under a floor (`min_degree` outputs of every `band` rows, as in `expander_mask`) a
    band that would fall short is repaired at the least loss found, or else keeps the supports that it has. Gradients
    are updated at once within a block of columns and lazily outside, so a sweep costs about one product with H. A
    masked refit follows every sweep. f never rises.

    Args:
        weight: W (out, in), float32 or float64.
        start: Z to begin with (out, in), zero off the mask.
        mask: Its mask (out, in), n kept in every group and the floor kept.
        gram: XXᵀ (in, in), in the dtype of `weight`.
        pattern: n kept of every m inputs.
        min_degree: The floor; 0 for none.
        band: Rows over which it holds.
        damping: Relative size of λ.
        sweeps: The most that are done. It ends early when fewer than one in a thousand groups change.
        refit_steps: Conjugate gradient steps after every sweep; 0 for none.

    Returns:
        The mask and Z, both (out, in). Memory: four buffers of (out, in) and those of the refit, one of (in, in).

    Raises:
        ConfigError: too many supports, or the mask does not keep the floor.
        ShapeError: the shapes do not belong together, or the mask does not keep the pattern.
        NumericalError: without damping, inputs of one group that depend on each other.

    >>> weight = torch.tensor([[3.0, 2.0, 1.0, 4.0]])
    >>> mask = torch.tensor([[True, True, False, False]])
    >>> coordinate_descent(weight, weight * mask, mask, torch.eye(4), NMPattern(2, 4))[0]
    tensor([[ True, False, False,  True]])
    """
    check_problem(weight, gram, mask)
    check_supports(pattern)
    supports = _supports(pattern, weight.device)
    check_mask(mask, pattern, min_degree, band)
    damped = damped_gram(gram, damping)
    columns, m = weight.shape[1], pattern.m
    width = max(1, _BLOCK // m) * m
    solution, mask = start.clone(), mask.clone()
    for _ in range(sweeps):
        gradient = (weight - solution) @ damped
        changed = 0
        for left in range(0, columns, width):
            right = min(left + width, columns)
            before = solution[:, left:right].clone()
            here, local = damped[left:right, left:right], gradient[:, left:right]
            tables = _inverses(here, supports)
            for k in range(0, right - left, m):
                old = solution[:, left + k : left + k + m]
                kept = mask[:, left + k : left + k + m]
                pull = local[:, k : k + m] + old @ here[k : k + m, k : k + m]
                gain = _gains(pull, tables[k // m])
                now = _support_index(kept, supports)
                chosen = _choose(gain, now, supports, min_degree, band)
                values = (tables[k // m][chosen] @ pull.unsqueeze(-1)).squeeze(-1)
                # Within the block the gradient is needed at once by the groups to the right.
                local -= (values - old) @ here[k : k + m]
                changed += int((chosen != now).sum())
                old.copy_(values)
                kept.copy_(supports[chosen])
            if right < columns:
                gradient[:, right:] -= (solution[:, left:right] - before) @ damped[left:right, right:]
        if refit_steps:
            solution = masked_refit(weight, mask, gram, damping, refit_steps, solution)
        if changed < _SETTLED * mask.numel() / m:
            break
    return mask, solution


def check_supports(pattern: NMPattern) -> None:
    """Raise unless the supports of a group can be enumerated.

    Raises:
        ConfigError: there are more than [`MAX_SUPPORTS`].
    """
    count = comb(pattern.m, pattern.n)
    if count > MAX_SUPPORTS:
        raise ConfigError(
            f"pattern {pattern} has {count} supports a group, and coordinate descent tries every one, {MAX_SUPPORTS} "
            "at most; use descent_sweeps=0"
        )


def _supports(pattern: NMPattern, device: torch.device) -> Tensor:
    """All supports of a group (supports, m), boolean."""
    kept = torch.tensor(list(itertools.combinations(range(pattern.m), pattern.n)), device=device)
    return torch.zeros(len(kept), pattern.m, dtype=torch.bool, device=device).scatter_(1, kept, True)


def _support_index(mask: Tensor, supports: Tensor) -> Tensor:
    """Which support each row (rows, m) of a group's mask is."""
    bits = 2 ** torch.arange(supports.shape[1], device=mask.device)
    codes = (supports * bits).sum(1)
    order = codes.argsort()
    return order[torch.searchsorted(codes[order], (mask * bits).sum(1))]


def _inverses(damped: Tensor, supports: Tensor) -> Tensor:
    """H_SS⁻¹ for every group and support, with zeros around it: (groups, supports, m, m).

    float64: two inputs that are nearly the same leave little of a 2 x 2 determinant.
    """
    m = supports.shape[1]
    groups = torch.stack([damped[k : k + m, k : k + m] for k in range(0, len(damped), m)]).double()
    # Off the support an identity stands in, so that all supports are inverted together.
    outside = torch.eye(m, dtype=torch.float64, device=damped.device) * ~supports[:, None, :]
    inside = (supports[:, :, None] & supports[:, None, :]).double()
    blocks = groups[:, None] * inside
    # A dead input, without damping: its pull is zero, and so is its value.
    dead = (blocks.diagonal(dim1=-2, dim2=-1) == 0) & supports
    inverse, failed = torch.linalg.inv_ex(blocks + outside + torch.diag_embed(dead.double()))
    if bool(failed.any()) or not bool(torch.isfinite(inverse).all()):
        raise NumericalError("inputs of one group depend on each other up to rounding; raise damping")
    return (inverse * inside).to(damped.dtype)


def _gains(pull: Tensor, table: Tensor) -> Tensor:
    """g_Sᵀ H_SS⁻¹ g_S: pull g (rows, m), table (supports, m, m); returns (rows, supports)."""
    m = pull.shape[1]
    upper, lower = torch.triu_indices(m, m, device=pull.device)
    twice = torch.where(upper == lower, 1.0, 2.0).to(pull.dtype)
    return (pull[:, upper] * pull[:, lower]) @ (table[:, upper, lower] * twice).t()


def _choose(gain: Tensor, now: Tensor, supports: Tensor, min_degree: int, band: int) -> Tensor:
    """The support of each row: the one that gains most, as far as the floor of every band allows."""
    best = gain.argmax(1)
    if not min_degree:
        return best
    for start, stop, height in bands(len(gain), band):
        chosen = best[start:stop].view(-1, height)
        short = (supports[chosen].sum(1) < min_degree).any(-1)
        if bool(short.any()):
            gains, current = gain[start:stop].unflatten(0, (-1, height)), now[start:stop].view(-1, height)
            chosen[short] = _repair(gains[short], chosen[short], current[short], supports, min_degree)
    return best


def _repair(gain: Tensor, chosen: Tensor, now: Tensor, supports: Tensor, min_degree: int) -> Tensor:
    """Supports that keep the floor: gain (bands, height, supports); chosen, now (bands, height).

    While a column of a band is short, the row that loses least by it takes a support with that column, none of the
    columns that it gives up being at the floor. The supports of `now` keep the floor, and stand where that ends badly.
    """
    chosen = chosen.clone()
    band = torch.arange(len(gain), device=gain.device)
    for _ in range(min_degree * supports.shape[1]):
        kept = supports[chosen]  # (bands, height, m)
        degree = kept.sum(1)
        if not bool((degree < min_degree).any()):
            break
        target = degree.argmin(-1)
        has = kept[band, :, target]  # (bands, height)
        gives_up = kept[:, :, None, :] & ~supports
        breaks = (gives_up & (degree <= min_degree)[:, None, None, :]).any(-1)
        allowed = supports[:, target].t()[:, None, :] & ~has[:, :, None] & ~breaks
        loss = gain.gather(2, chosen[:, :, None]) - gain
        least, where = loss.masked_fill(~allowed, torch.inf).flatten(1).min(1)
        moves = torch.isfinite(least) & (degree.amin(-1) < min_degree)
        row, support = where // len(supports), where % len(supports)
        chosen[band[moves], row[moves]] = support[moves]
    total = gain.gather(2, chosen[:, :, None]).sum((1, 2))
    before = gain.gather(2, now[:, :, None]).sum((1, 2))
    good = (supports[chosen].sum(1) >= min_degree).all(-1) & (total >= before)
    return torch.where(good[:, None], chosen, now)
