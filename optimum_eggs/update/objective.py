"""The layer-wise objective that every solver here lowers: ‖(W − Z)X‖²_F + λ‖W − Z‖²_F."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """‖(W − Z)X‖²_F / ‖WX‖²_F, from the Gram matrix. weight W and pruned Z (out, in); gram XXᵀ (in, in).

    0 when the layer's output was zero and still is.
    """
    return ratio(energies(weight, pruned, gram))


def energies(weight: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    """‖(W − Z)X‖²_F and ‖WX‖²_F, float64 (2,): those of a layer are the sums of those of its rows."""
    difference = weight - pruned
    # A sum of squares that is nearly zero may round below it. NaN stays NaN.
    lost = ((difference @ gram) * difference).sum(dtype=torch.float64).clamp_min(0)
    return torch.stack([lost, ((weight @ gram) * weight).sum(dtype=torch.float64)])


def ratio(energy: Tensor) -> float:
    """What is lost over the whole, of `energies`; what is lost, where the whole is zero."""
    lost, whole = energy.tolist()
    return lost / whole if whole > 0 else lost
