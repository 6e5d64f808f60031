"""The layer-wise objective that every solver here lowers: ‖(W − Z)X‖²_F + λ‖W − Z‖²_F."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError


def check_problem(weight: Tensor, gram: Tensor, mask: Tensor | None = None) -> None:
    """Raise unless weight (out, in), gram (in, in) and mask (out, in) belong together.

    Raises:
        ShapeError: they do not.
    """
    of_mask = "" if mask is None else f", mask {tuple(mask.shape)}"
    fits = weight.dim() == 2 and gram.shape == (weight.shape[1],) * 2 and (mask is None or mask.shape == weight.shape)
    if not fits:
        raise ShapeError(
            f"weight {tuple(weight.shape)} and gram {tuple(gram.shape)}{of_mask} do not belong together; weight and "
            "mask must be (out, in), gram (in, in)"
        )


def damped_gram(gram: Tensor, damping: float) -> Tensor:
    """XXᵀ + λI (in, in), λ = damping · mean(diag XXᵀ); a new tensor.

    >>> damped_gram(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
    tensor([[4., 1.],
            [1., 2.]])
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return damped


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """‖(W − Z)X‖²_F / ‖WX‖²_F, from the Gram matrix. weight W and pruned Z (out, in); gram XXᵀ (in, in).

    0 when the layer's output was zero and still is.
    """
    difference = weight - pruned
    # A sum of squares that is nearly zero may round below it. NaN stays NaN.
    lost = ((difference @ gram) * difference).sum(dtype=torch.float64).clamp_min(0)
    whole = ((weight @ gram) * weight).sum(dtype=torch.float64)
    return float(lost / whole) if bool(whole > 0) else float(lost)
