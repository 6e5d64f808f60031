"""Masked refit: least squares over the surviving weights, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem


def masked_refit(
    weight: Tensor, mask: Tensor, problem: Problem, steps: int = 15, start: Tensor | None = None
) -> Tensor:
    """Minimise ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over Z supported on the mask, λ = damping · mean(diag XXᵀ).

    Preconditioned conjugate gradients (Jacobi), projected onto the mask, on every row at the same time; each step is
    one product with the Gram matrix. The objective falls with every step.

    Args:
        weight: W (out, in), in the dtype of the Gram matrix.
        mask: (out, in), boolean.
        problem: Of its inputs.
        steps: Number of conjugate gradient steps.
        start: Z to begin with (out, in), zero off the mask. Default: W∘mask.

    Returns:
        Z (out, in), zero off the mask. If every input was zero, what it began with. Memory: five buffers of (out,
        in).

    Raises:
        ShapeError: the shapes do not belong together.
    """
    problem.check(weight, mask)
    solution = weight * mask if start is None else start.clone()
    if not bool(problem.gram.diagonal().any()):
        return solution
    kind = torch.finfo(weight.dtype)
    scale = problem.diagonal.clamp_min(kind.tiny)  # a dead input, without damping

    residual = problem.times(weight - solution).mul_(mask)
    direction = residual / scale
    energy = (residual * direction).sum(1, keepdim=True)
    solved = energy * kind.eps**2
    for _ in range(steps):
        curved = problem.times(direction).mul_(mask)
        curvature = (direction * curved).sum(1, keepdim=True)
        # A row stays where it is once its residual is rounding, or where its curvature is: along directions that few
        # tokens have seen, a small damping is lost in the sum, and a step would go anywhere.
        rounding = kind.eps * (direction.square() * scale).sum(1, keepdim=True)
        goes_on = (energy > solved) & (curvature > rounding)
        step = torch.where(goes_on, energy / curvature, 0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        towards = residual / scale
        fresh = (residual * towards).sum(1, keepdim=True)
        direction.mul_(torch.where(goes_on, fresh / energy, 0)).add_(towards)
        energy = fresh
    return solution
