"""What counts as a dense linear layer, and its weight as (out, in); and `DenseLinear`, one that is read fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.dense_linear import dense_linear

torch.fx.wrap("dense_linear")


class DenseLinear(nn.Linear):
    """An `nn.Linear` of a packed model, its head for one: it multiplies a few tokens as fast as it reads its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        return dense_linear(input, self.weight, self.bias)


def read_fast(model: nn.Module, fast: bool = True) -> None:
    """Make every `nn.Linear` of `model` a [`DenseLinear`] in place, or make it what it was."""
    before, after = (nn.Linear, DenseLinear) if fast else (DenseLinear, nn.Linear)
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after


@contextmanager
def reading_fast(block: nn.Module) -> Iterator[None]:
    """Every `nn.Linear` of `block` is a [`DenseLinear`] meanwhile."""
    plain = [module for module in block.modules() if type(module) is nn.Linear]
    try:
        for module in plain:
            module.__class__ = DenseLinear
        yield
    finally:
        for module in plain:
            module.__class__ = nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer that stores its weight as (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_dense_linear(module: nn.Module) -> bool:
    """Whether `module` is a layer that can be packed: exactly `nn.Linear`, `Conv1D`, Falcon's or a [`DenseLinear`].

    Other subclasses are left alone, since what their forward does with the weight is not known.
    """
    return type(module) in (nn.Linear, DenseLinear) or is_conv1d(module) or _is_falcons(module)


def _is_falcons(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of transformers' Falcon: x Wᵀ, and then b."""
    kind = type(module)
    return kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is of PEFT: a model, or a layer, under adapters."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense linear layer as (out, in): a view, without gradient."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def as_conv1d(linear: nn.Linear) -> nn.Module:
    """A dense layer as transformers' `Conv1D`, which always has a bias."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):  # its own initialisation would draw random numbers
        conv = Conv1D(linear.out_features, linear.in_features)
    weight, bias = linear.weight, linear.bias
    conv.weight = nn.Parameter(weight.t().contiguous(), requires_grad=weight.requires_grad)
    conv.bias = bias if bias is not None else nn.Parameter(weight.new_zeros(linear.out_features))
    return conv.train(linear.training)
