"""How far hidden states are from others."""

from __future__ import annotations

import torch
from torch import Tensor


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖y − t‖²/‖t‖², of hidden states (..., hidden): a number.

    Relative for each token, since what reads the hidden states normalises each token by itself: the few tokens that
    carry activations a thousand times as large must not hide all others.
    """
    size = target.square().sum(-1)
    return ((output - target).square().sum(-1) / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()
