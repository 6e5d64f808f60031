"""The error-corrected target: what a layer should give now that its inputs have changed."""

from __future__ import annotations

from torch import Tensor

from ..errors import ShapeError
from .problem import Problem


def corrected_target(weight: Tensor, missing: Tensor, problem: Problem, correction: float = 1.0) -> Tensor:
    """The weight that gives, on the inputs X̂ that pruning has changed, what W gave on the dense model's inputs X.

    Minimising ‖ZX̂ − WX‖²_F + λ‖Z − W‖²_F over Z gives W + W(XX̂ᵀ − X̂X̂ᵀ)(X̂X̂ᵀ + λI)⁻¹, λ = damping · mean(diag X̂X̂ᵀ):
    the asymmetric calibration of GPTAQ (Li et al. 2025, arXiv 2504.02692), of which `correction` is the share taken.
    Where X̂ = X it is W itself.

    Args:
        weight: W (out, in), or some of its rows, in the dtype of the Gram matrix.
        missing: W(XX̂ᵀ − X̂X̂ᵀ) (out, in), of the same rows.
        problem: Of the inputs X̂.
        correction: From 0 to 1.

    Returns:
        (out, in). Memory: two buffers of (out, in), and the problem's inverse factor.

    Raises:
        ShapeError: the shapes do not belong together.
        NumericalError: the Gram matrix cannot be factorised.

    The one input is half of what it was in the dense model:

    >>> import torch
    >>> gram, cross = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> weight = torch.tensor([[3.0]])
    >>> corrected_target(weight, weight @ (cross - gram), Problem(gram, damping=0.0))
    tensor([[6.]])
    """
    problem.check(weight)
    if missing.shape != weight.shape:
        raise ShapeError(f"missing {tuple(missing.shape)} is not of the weight's shape {tuple(weight.shape)}")
    factor = problem.inverse_factor
    return (missing @ factor.t() @ factor).mul_(correction).add_(weight)
