"""RIA: the share of a weight in its row and in its column, times a power of the size of its input."""

import torch
from torch import Tensor


def ria(weight: Tensor, input_norm: Tensor, exponent: float = 0.5) -> Tensor:
    """(|W_ij| / Σ_j|W_ij| + |W_ij| / Σ_i|W_ij|) · ‖x_j‖₂^a (Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF).

    weight (out, in); input_norm (in,), L2 over all calibration tokens; `exponent` is a. Returns (out, in).
    A row or a column of zeros scores zero.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    row = size.sum(dim=1, keepdim=True).clamp_min(tiny)
    column = size.sum(dim=0, keepdim=True).clamp_min(tiny)
    return (size / row + size / column) * input_norm**exponent
