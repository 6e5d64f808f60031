"""`CodedLinear`: a linear layer that holds its weight as integers, packed or dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ShapeError
from ..ops.coded_linear import coded_linear, values_of
from ..packing import meta_width, packed_width, unpack, unpack_mask
from ..packing.codes import Coding, decode, drawn_codes, in_steps, store_codes, whole_range
from ..pattern import NMPattern
from .dense import as_conv1d
from .linear import TWO_OF_FOUR, NMLinear

INT8 = Coding("int8")
torch.fx.wrap("coded_linear")


class CodedLinear(NonDynamicallyQuantizableLinear):
    """y = x Wᵀ + b with the kept values of W as codes times scales; or all values, where there is no pattern.

    What it computes in is the dtype of x. Casting a model casts its bias and leaves codes and scales as they are. A
    weight of integers has no gradient: [`CodedLinear.to_packed`] makes a layer that trains.

    Args:
        in_features: As for `nn.Linear`.
        out_features: Likewise.
        bias: Likewise.
        pattern: n kept of every m inputs, or None where all are.
        coding: Of the values.
        fan_in_fan_out: As of [`NMLinear`].
        device: As for `nn.Linear`.
        dtype: Of the bias.

    Attributes:
        weight: The codes as they are stored (out, ⌈in·n/m · bits/8⌉): int8, or uint8 of two codes each. A parameter
            without gradient.
        weight_scale: (out, ⌈in/group⌉), bfloat16, a buffer.
        weight_meta: One bit for every dense position (out, ⌈in/8⌉), uint8, a buffer; None where all are kept.
        bias: (out,) or None.
        merge_error: Of values that an adapter was merged into and that were rounded again, their distance from the sum,
            ‖Ŵ − W‖/‖W‖; else None.

    A new layer holds uninitialised values and bits: fill it from a state dict, or use [`CodedLinear.from_codes`].

    Raises:
        ShapeError: `in_features` is not a multiple of m, or a row has an odd number of values of four bits.
    """

    weight_scale: Tensor
    weight_meta: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: NMPattern | None = TWO_OF_FOUR,
        coding: Coding = INT8,
        *,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.coding, self.fan_in_fan_out = pattern, coding, fan_in_fan_out
        self.merge_error: float | None = None
        if coding.bits == 4 and self.values % 2:
            raise ShapeError(f"rows of {self.values} values, an odd number, cannot be {coding}; use int8")
        codes = torch.empty(out_features, coding.width(self.values), device=device, dtype=coding.dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(out_features, coding.scales(in_features), device=device, dtype=torch.bfloat16)
        self.register_buffer("weight_scale", scale)
        meta = None
        if pattern is not None:
            meta = torch.empty(out_features, meta_width(in_features), device=device, dtype=torch.uint8)
        self.register_buffer("weight_meta", meta)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def values(self) -> int:
        """Kept in a row."""
        return self.in_features if self.pattern is None else packed_width(self.in_features, self.pattern)

    def reset_parameters(self) -> None:
        """Do nothing: random bits would not be a legal pattern."""

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, linear: NMLinear | nn.Linear, codes: Tensor, scale: Tensor, coding: Coding, fan_in_fan_out: bool = False
    ) -> CodedLinear:
        """Take the place of a packed layer, or of a dense one whose values are all kept.

        Args:
            linear: The layer; its mask, bias and mode are taken over.
            codes: (out, values), int8.
            scale: (out, ⌈in/group⌉).
            coding: Of the codes.
            fan_in_fan_out: As of [`NMLinear`], which has its own.

        Raises:
            ShapeError: codes or scales do not fit the layer.
        """
        pattern = meta = None
        if isinstance(linear, NMLinear):
            pattern, meta, fan_in_fan_out = linear.pattern, linear.weight_meta, linear.fan_in_fan_out
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            pattern,
            coding,
            fan_in_fan_out=fan_in_fan_out,
            device="meta",
        )
        if codes.shape != (layer.out_features, layer.values) or scale.shape != layer.weight_scale.shape:
            raise ShapeError(
                f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not fit the layer; they must be "
                f"{(layer.out_features, layer.values)} and {tuple(layer.weight_scale.shape)}"
            )
        layer.weight = nn.Parameter(store_codes(codes, coding), requires_grad=False)
        layer.weight_scale = scale.to(torch.bfloat16)
        layer.weight_meta = meta
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def mask(self) -> Tensor:
        """The boolean mask (out, in) of the positions kept."""
        if self.weight_meta is None:
            return torch.ones(self.out_features, self.in_features, dtype=torch.bool, device=self.weight.device)
        return unpack_mask(self.weight_meta, self.in_features)

    def kept_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values (out, values) that the codes stand for."""
        n, m = (1, 1) if self.pattern is None else (self.pattern.n, self.pattern.m)
        kind, group = self.coding.kind, self.coding.group
        return values_of(self.weight, self._scale(), self.in_features, n, m, kind, group, dtype)

    @torch.no_grad()
    def encode(self, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """The codes as they are stored, and the scales, that stand for other values (out, values); and their distance.

        A group keeps its scale if its values fit; otherwise the largest is the highest code. Codes are drawn, so that a
        small change of many values is not rounded away. The distance is ‖Ŵ − W‖/‖W‖.
        """
        coding, per_scale = self.coding, self.coding.per_scale(self.pattern)
        values, own = values.to(torch.float32), self._scale()
        steps = in_steps(values, own.to(torch.float32), per_scale)
        outside = (steps < coding.lowest - 0.5) | (steps > -coding.lowest - 0.5)
        padded = torch.nn.functional.pad(outside, (0, -values.shape[1] % per_scale))
        fits = ~padded.unflatten(1, (-1, per_scale)).any(2) & (own != 0)
        scale = torch.where(fits, own, whole_range(values, coding, per_scale))
        stored = store_codes(drawn_codes(values, scale.to(torch.float32), coding, per_scale), coding)
        found = decode(stored, scale, self.values, coding, per_scale, torch.float32)
        return stored, scale, float((found - values).norm() / values.norm().clamp_min(1e-30))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in), zeros in place."""
        values = self.kept_values(dtype)
        if self.pattern is None or self.weight_meta is None:
            return values
        return unpack(values, self.weight_meta, self.pattern)

    @torch.no_grad()
    def to_packed(self, dtype: torch.dtype = torch.float32) -> NMLinear:
        """The packed layer of the values, which trains.

        Raises:
            ShapeError: there is no pattern, so nothing to pack.
        """
        if self.pattern is None or self.weight_meta is None:
            raise ShapeError("this layer keeps all its values; use to_linear()")
        bias = self.bias
        layer = NMLinear(
            self.in_features,
            self.out_features,
            bias is not None,
            self.pattern,
            fan_in_fan_out=self.fan_in_fan_out,
            device="meta",
        )
        layer.weight, layer.weight_meta = nn.Parameter(self.kept_values(dtype)), self.weight_meta
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        return layer.train(self.training)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense layer with its zeros in place: an `nn.Linear`, whatever kind was packed."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def to_original(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The dense layer of the kind that was packed: an `nn.Linear`, or a `Conv1D` if `fan_in_fan_out`."""
        linear = self.to_linear(dtype)
        return as_conv1d(linear) if self.fan_in_fan_out else linear

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        # Looked up directly where they are, as in `NMLinear`.
        parameters, coding = self._parameters, self.coding
        n, m = (1, 1) if self.pattern is None else (self.pattern.n, self.pattern.m)
        codes: Any = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        scale, meta = self._scale(), self._buffers["weight_meta"]
        return coded_linear(x, codes, scale, meta, bias, n, m, coding.kind, coding.group)

    def _scale(self) -> Tensor:
        return self._buffers["weight_scale"]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with keep_scale(self):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        pattern = "all" if self.pattern is None else self.pattern
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={pattern}, values={self.coding.kind}, group={self.coding.group}"
        )


@contextmanager
def keep_scale(module: nn.Module) -> Iterator[None]:
    """Keep the dtype of a module's scales through a cast of the model, which is one of what it computes in."""
    scale: Any = module.weight_scale
    yield
    now: Any = module.weight_scale
    if now.dtype is not scale.dtype:
        module.weight_scale = scale.to(now.device)
