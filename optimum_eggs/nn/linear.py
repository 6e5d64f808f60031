"""`NMLinear`: a linear layer that holds its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ShapeError
from ..masks import topn_mask
from ..ops import held, nm_linear
from ..packing import meta_width, pack, packed_width, unpack, unpack_mask
from ..pattern import NMPattern
from .dense import as_conv1d, dense_weight, is_conv1d, is_dense_linear

TWO_OF_FOUR = NMPattern(2, 4)
torch.fx.wrap("nm_linear")  # a symbolic trace takes the call as one node, as it does that of a dense layer


class NMLinear(NonDynamicallyQuantizableLinear):
    """y = x Wᵀ + b with W packed N:M.

    A subclass of `nn.Linear` so that tools that look for linear layers find it, by the class that torch keeps for those
    that quantisers leave alone: torchao, quanto, bitsandbytes and torch's own do. Its `weight` is the packed one, of
    shape (out, in·n/m), so a tool that mistakes it for a dense one fails on the shape and cannot do silent harm.

    On a GPU it holds its dense weight too, from the first call in eval mode without gradients of the weight on (under
    `torch.no_grad()`, or with a frozen weight), and makes it again when the packed one changes. torch does not count
    changes of `weight.data` in place, nor those by other means than its operations: call [`NMLinear.forget`] after one.

    Args:
        in_features: As for `nn.Linear`.
        out_features: Likewise.
        bias: Likewise.
        pattern: n kept of every m inputs.
        fan_in_fan_out: The layer replaced stored its weight as (in, out) (`Conv1D`), as in PEFT.
        device: As for `nn.Linear`.
        dtype: Likewise.

    Attributes:
        weight: The values kept (out, in·n/m), a parameter. Its gradient is of these alone, so training fills no zero.
        weight_meta: One bit for every dense position (out, ⌈in/8⌉), a uint8 buffer.
        bias: (out,) or None.

    A new layer holds uninitialised values and bits: fill it from a state dict, or use [`NMLinear.from_linear`].

    Raises:
        ShapeError: `in_features` is not a multiple of m.

    >>> layer = NMLinear.from_linear(nn.Linear(8, 3), NMPattern(2, 4))
    >>> layer.weight.shape, layer.weight_meta.shape
    (torch.Size([3, 4]), torch.Size([3, 1]))
    >>> layer
    NMLinear(in_features=8, out_features=3, bias=True, pattern=2:4)
    """

    weight_meta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: NMPattern = TWO_OF_FOUR,
        *,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.fan_in_fan_out = pattern, fan_in_fan_out
        values = torch.empty(out_features, packed_width(in_features, pattern), device=device, dtype=dtype)
        self.weight = nn.Parameter(values)
        meta = torch.empty(out_features, meta_width(in_features), device=device, dtype=torch.uint8)
        self.register_buffer("weight_meta", meta)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Do nothing: random bits would not be a legal pattern."""

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Module, pattern: NMPattern, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> NMLinear:
        """Pack a dense layer.

        Args:
            linear: An `nn.Linear`, or transformers' `Conv1D`.
            pattern: n kept of every m inputs.
            mask: (out, in), boolean; without one the n largest magnitudes of each group stay.
            weight: (out, in), the values to keep in place of the layer's own; cast to the layer's dtype.

        Raises:
            ShapeError: the layer is of another kind, m does not divide in, or the mask does not fit.
        """
        if not is_dense_linear(linear):
            raise ShapeError(f"{type(linear).__name__} is not a dense linear layer; pass an nn.Linear or a Conv1D")
        own = dense_weight(linear)
        mask = topn_mask(own.abs(), pattern) if mask is None else mask
        values, meta = pack(own if weight is None else weight.to(own.dtype), mask, pattern)
        bias = linear.bias
        layer = cls(
            own.shape[1],
            own.shape[0],
            bias is not None,
            pattern,
            fan_in_fan_out=is_conv1d(linear),
            device="meta",
            dtype=own.dtype,
        )
        layer.weight = nn.Parameter(values, requires_grad=linear.get_parameter("weight").requires_grad)
        layer.weight_meta = meta
        if isinstance(bias, Tensor):
            layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    def mask(self) -> Tensor:
        """The boolean mask (out, in) of the positions kept."""
        return unpack_mask(self.weight_meta, self.in_features)

    def dense_weight(self) -> Tensor:
        """The dense weight (out, in), zeros in place, in the layer's dtype, without gradient."""
        return unpack(self.weight.detach(), self.weight_meta, self.pattern)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer with its zeros in place: an `nn.Linear`, whatever kind was packed."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def to_original(self) -> nn.Module:
        """The dense layer of the kind that was packed: an `nn.Linear`, or a `Conv1D` if `fan_in_fan_out`."""
        linear = self.to_linear()
        return as_conv1d(linear) if self.fan_in_fan_out else linear

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        # Looked up directly where they are: a model makes hundreds of calls a token, and attributes take 0.5 µs each.
        parameters, pattern = self._parameters, self.pattern
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        meta, hold = self._buffers["weight_meta"], not self.training
        return nm_linear(x, weight, meta, bias, pattern.n, pattern.m, hold)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Let go of all that is held beside the packed weight, to be made again of what the weight is now."""
        held.forget(self._parameters.get("weight"), self._buffers.get("weight_meta"))

    def train(self, mode: bool = True) -> NMLinear:
        """Set the mode. What is held beside the packed weight goes when the mode changes."""
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget()  # it hangs on weak references, which keep torch from swapping tensors
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}"
        )
