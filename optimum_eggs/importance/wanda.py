"""Wanda: the size of a weight times the size of its input."""

from torch import Tensor


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W|·‖x‖₂ (Sun et al. 2023, https://arxiv.org/abs/2306.11695).

    weight (out, in); input_norm (in,), L2 over all calibration tokens. Returns (out, in).
    """
    return weight.abs() * input_norm
