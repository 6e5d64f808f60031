"""ADMM: mask and surviving weights found together, for any set of masks that can be projected onto."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem

# Constants of the published program: where ρ starts, by how much it grows every third step, given how much the mask has
# changed since, and when it ends.
_FIRST_PENALTY, _LARGEST_PENALTY = 0.1, 1e6
_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_STUCK, _SHRINKAGE = 0.005, 5
_SETTLED, _AT_LEAST = 3e-4, 30


def admm(
    weight: Tensor,
    problem: Problem,
    project: Callable[[Tensor], Tensor],
    iterations: int = 300,
    total: Callable[[int], int] = int,
) -> tuple[Tensor, Tensor]:
    """Minimise ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over Z and its mask (ALPS: Meng et al., NeurIPS 2024, arXiv 2406.07831).

    With H = XXᵀ + λI scaled to a unit diagonal, λ = damping · mean(diag XXᵀ), and W the scaled weight, it begins with
    D = P(W), V = 0, and repeats B = (WH − V + ρD)(H + ρI)⁻¹, D = P(B + V/ρ), V = V + ρ(B − D). P(B) comes out.

    The rules are those of the authors' program (https://github.com/mazumder-lab/ALPS). Every third step counts the
    positions that entered or left the mask of D since the count before, as a share of those kept. ρ starts at 0.1. It
    grows by 1.3 above 10 %, by 1.2 above 0.5 %, and by 1.1 below, once it has grown. Before, it is too large to move
    the mask, and is divided by 5; if the mask has changed nevertheless, B, D and V begin anew. The end is a mask that
    does not change although ρ has grown, or one that changes by less than 0.03 % after more than 30 steps.

    What comes out is a good mask with values near the optimum: refit them. That program does ten steps of
    `masked_refit`, from these values.

    Args:
        weight: W (out, in), in the dtype of the Gram matrix.
        problem: Of its inputs.
        project: From a score (out, in) to the mask (out, in) of the largest total score that is allowed. It is called
            once at the start, once in every step, and once at the end.
        iterations: The most steps that are done.
        total: The sum of a number over everyone who solves rows of the same layer: they all go by the same ρ, and
            get what one would get who solved them all.

    Returns:
        The mask (out, in) and Z (out, in), zero off the mask. Memory: eight buffers of (out, in), one of (in, in), and
        while factorising one more, in float64 where ρ is small.

    Raises:
        ShapeError: the shapes do not belong together.
        NumericalError: H + ρI cannot be factorised.
    """
    problem.check(weight)
    scaled = weight * problem.scale
    penalty, grown = _FIRST_PENALTY, False
    rows = total(len(weight))  # so that everyone rounds alike
    reference = project(scaled.square())
    kept = max(1, total(int(reference.sum())))
    start = scaled * reference
    smooth, split, dual = scaled, start, torch.zeros_like(scaled)
    solve: Callable[[Tensor], Tensor] | None = None
    for step in range(1, iterations + 1):
        if solve is None:  # the one before is gone by then
            solve = _solver(problem, penalty, rows)
        # WH = W(H + ρI) − ρW, so B = W − (V + ρ(W − D))(H + ρI)⁻¹. In WH the large eigenvalues of H would drown, in
        # float32, what the small ones have to say.
        smooth = scaled - solve(torch.add(dual, scaled - split, alpha=penalty))
        target = torch.add(smooth, dual, alpha=1 / penalty)
        mask = project(target.square())
        split = target.mul_(mask)
        dual.add_(smooth - split, alpha=penalty)
        if step % _EVERY:
            continue
        changed = total(int((mask != reference).sum())) / kept
        reference = mask
        if changed > _STUCK or (changed and grown):
            grown = True
            penalty = min(penalty * next(growth for share, growth in _GROWTH if changed > share), _LARGEST_PENALTY)
        elif grown:
            break
        else:
            penalty /= _SHRINKAGE
            if changed:
                smooth, split, dual = scaled, start, torch.zeros_like(scaled)
        if step > _AT_LEAST and changed < _SETTLED:
            break
        solve = None
    mask = project(smooth.square())
    return mask, smooth * mask / problem.scale


def _solver(problem: Problem, penalty: float, rows: int) -> Callable[[Tensor], Tensor]:
    """From a matrix (out, in) of that many rows to its product with (H + ρI)⁻¹."""
    lower = problem.penalised(penalty)
    dtype = problem.gram.dtype
    # One ρ serves three steps. A product with the inverse takes two thirds of the time of two triangular systems, or as
    # long; the inverse itself about as long as a product with half as many rows as columns, or three times that.
    if 2 * rows >= len(lower):
        inverse = torch.cholesky_inverse(lower).to(dtype)
        return lambda matrix: matrix @ inverse
    factor = lower.to(dtype)

    def solve(matrix: Tensor) -> Tensor:
        # With the rows on the left they are faster than `cholesky_solve`, which copies the factor.
        half = torch.linalg.solve_triangular(factor.t(), matrix, upper=True, left=False)
        return torch.linalg.solve_triangular(factor, half, upper=False, left=False)

    return solve
