"""`RoundedLinear`: a packed layer that trains, and computes with its values as they will be stored in integers."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import nm_linear
from ..packing.codes import Coding, nearest_codes, straight_through
from .coded import CodedLinear
from .linear import NMLinear


class RoundedLinear(NMLinear):
    """y = x Wᵀ + b, W packed, its values rounded to codes times scales in the forward pass.

    Attributes:
        weight: The values before rounding (out, in·n/m), a parameter.
        weight_scale: (out, ⌈in/group⌉), a parameter.
        coding: Of the values.
    """

    coding: Coding
    weight_scale: nn.Parameter

    @classmethod
    @torch.no_grad()
    def from_coded(cls, coded: CodedLinear, dtype: torch.dtype = torch.float32) -> RoundedLinear:
        """Take the place of a coded layer that is packed."""
        packed = coded.to_packed(dtype)
        layer = cls(
            packed.in_features,
            packed.out_features,
            packed.bias is not None,
            packed.pattern,
            fan_in_fan_out=packed.fan_in_fan_out,
            device="meta",
        )
        layer.weight, layer.weight_meta, layer.bias = packed.weight, packed.weight_meta, packed.bias
        layer.coding = coded.coding
        layer.weight_scale = nn.Parameter(coded.weight_scale.to(dtype))
        return layer.train(coded.training)  # type: ignore[return-value]

    @torch.no_grad()
    def to_coded(self) -> CodedLinear:
        """The coded layer that computes the same."""
        scale = self.weight_scale.to(torch.bfloat16)
        values = self.weight.detach().to(torch.float32)
        codes = nearest_codes(values, scale.to(torch.float32), self.coding, self._per_scale)
        return CodedLinear.from_codes(self, codes, scale, self.coding)

    @property
    def _per_scale(self) -> int:
        return self.coding.per_scale(self.pattern)

    def rounded(self, values: Tensor) -> Tensor:
        """Values (out, in·n/m), such as the weight with something added, as they are when they are stored."""
        return straight_through(values, self.weight_scale, self.coding, self._per_scale)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        return nm_linear(x, self.rounded(self.weight), self.weight_meta, self.bias, self.pattern.n, self.pattern.m)


def round_while_training(model: nn.Module) -> None:
    """Replace packed layers of integers by those that train, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedLinear) and module.pattern is not None:
            model.set_submodule(name, RoundedLinear.from_coded(module))


def store_rounded(model: nn.Module) -> None:
    """Undo [`round_while_training`], in place, with the values that the layers have come to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedLinear):
            model.set_submodule(name, module.to_coded())
