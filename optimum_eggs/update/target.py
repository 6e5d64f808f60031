"""The error-corrected target: what a layer should compute now that its inputs have changed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .objective import check_problem, damped_gram


def corrected_target(
    weight: Tensor, gram: Tensor, cross: Tensor, correction: float = 1.0, damping: float = 0.01
) -> Tensor:
    """The weight that gives, on the inputs X̂ that pruning has changed, what W gave on the dense model's inputs X.

    Minimising ‖ZX̂ − WX‖²_F + λ‖Z − W‖²_F over Z gives W + W(XX̂ᵀ − X̂X̂ᵀ)(X̂X̂ᵀ + λI)⁻¹, λ = damping · mean(diag X̂X̂ᵀ);
    `correction` is the share of the second term that is taken. Where X̂ = X it is W itself.

    Args:
        weight: W (out, in), float32 or float64.
        gram: X̂X̂ᵀ (in, in), in the dtype of `weight`.
        cross: XX̂ᵀ (in, in), over the same tokens.
        correction: From 0 to 1.
        damping: Relative size of λ.

    Returns:
        (out, in); W if all inputs are dead. Memory: one buffer of (out, in), three of (in, in) in float64.

    Raises:
        ShapeError: the shapes do not belong together.
        NumericalError: the Gram matrix cannot be factorised.
    """
    check_problem(weight, gram)
    check_problem(weight, cross)
    if not bool(gram.diagonal().any()):
        return weight.clone()  # all inputs are dead
    # float64: inputs that nearly repeat each other make the Gram matrix singular but for the damping.
    factor, failed = torch.linalg.cholesky_ex(damped_gram(gram.double(), damping))
    if int(failed):
        raise NumericalError(f"the Gram matrix is not positive definite; raise damping={damping}")
    changed = cross.to(torch.float64, copy=True).sub_(gram)
    change = torch.cholesky_solve(changed.t(), factor).t()
    return weight + correction * (weight @ change.to(weight.dtype))
