"""Magnitude: the size of a weight alone."""

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W| (Han et al. 2015, https://arxiv.org/abs/1506.02626). weight (out, in). Returns (out, in)."""
    return weight.abs()
