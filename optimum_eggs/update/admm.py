"""ADMM: mask and surviving weights found together, for any set of masks that can be projected onto."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NumericalError
from .objective import check_problem, damped_gram

# Published constants of ALPS: how ρ starts, and by how much it grows every third step, given the share of the kept
# weights that changed since.
_FIRST_PENALTY = 0.1
_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def admm(
    weight: Tensor, gram: Tensor, project: Callable[[Tensor], Tensor], damping: float = 0.01, iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """Minimise ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over Z and its mask (ALPS: Meng et al., NeurIPS 2024, arXiv 2406.07831).

    With H = XXᵀ + λI scaled to a unit diagonal, λ = damping · mean(diag XXᵀ), and W₀ the scaled weight:
    B = (W₀H − V + ρD)(H + ρI)⁻¹, D = P(B + V/ρ), V = V + ρ(B − D). The penalty ρ starts at 0.1 and grows every third
    step by 1.3, 1.2 or 1.1, as the mask has changed by 10 %, 0.5 % or at all; the iteration ends when it has not.

    What comes out is a good mask with values near the optimum: refit them.

    Args:
        weight: W (out, in), float32 or float64.
        gram: XXᵀ (in, in), in the dtype of `weight`.
        project: From a score (out, in) to the mask (out, in) of the largest total score that is allowed.
        damping: Relative size of λ.
        iterations: The most that are done.

    Returns:
        The mask (out, in) and Z (out, in), zero off the mask. Memory: eight buffers of (out, in), three of (in, in).

    Raises:
        ShapeError: the shapes do not belong together.
        NumericalError: the eigendecomposition fails.
    """
    check_problem(weight, gram)
    damped = damped_gram(gram, damping)
    scale = damped.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)  # a dead input, without damping
    damped.div_(scale).div_(scale[:, None])
    scaled = weight * scale
    pull = scaled @ damped
    # float32 is enough for the eigenvectors: what is inverted is H + ρI, and ρ is never below 0.1 of the diagonal.
    try:
        values, vectors = torch.linalg.eigh(damped)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"the Gram matrix has no eigendecomposition ({error}); raise damping={damping}") from error
    values.clamp_min_(0)
    del damped

    penalty = _FIRST_PENALTY
    mask = reference = project(scaled.square())
    kept = max(1, int(mask.sum()))
    split, dual = scaled * mask, torch.zeros_like(scaled)
    for step in range(1, iterations + 1):
        smooth = torch.addcmul(pull - dual, split, split.new_tensor(penalty))
        smooth = ((smooth @ vectors).div_(values + penalty)) @ vectors.t()
        target = smooth + dual / penalty
        mask = project(target.square())
        split = target * mask
        dual.add_(smooth.sub_(split), alpha=penalty)
        if step % _EVERY == 0:
            changed = int((mask & ~reference).sum())
            if not changed:
                break
            penalty *= next(growth for share, growth in _GROWTH if changed >= share * kept)
            reference = mask
    return mask, split / scale
