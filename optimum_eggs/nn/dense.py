"""What counts as a dense linear layer, and its weight as (out, in)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer that stores its weight as (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_dense_linear(module: nn.Module) -> bool:
    """Whether `module` is a layer that can be packed: exactly `nn.Linear`, `Conv1D`, or Falcon's, which is the former.

    Other subclasses are left alone, since what their forward does with the weight is not known.
    """
    return type(module) is nn.Linear or is_conv1d(module) or _is_falcons(module)


def _is_falcons(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of transformers' Falcon: x Wᵀ, and then b."""
    kind = type(module)
    return kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"


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
