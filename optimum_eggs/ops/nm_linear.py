"""The packed linear operation, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import unpack
from ..pattern import NMPattern


def nm_linear(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """X Wᵀ + b with W packed n:m. Equal bit for bit to `F.linear` on the dense matrix with its zeros in place.

    x (..., in); weight (out, in·n/m), the values kept; weight_meta (out, ⌈in/8⌉), uint8; bias (out,) or None.
    Returns (..., out). Differentiable in x, weight and bias. The dense matrix exists while the call runs.
    """
    return torch.nn.functional.linear(x, unpack(weight, weight_meta, NMPattern(n, m)), bias)
