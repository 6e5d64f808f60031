"""The packed linear operation on integer values: `torch.ops.optimum_eggs.coded_linear`, and the short way to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import ShapeError
from ..packing.codes import Coding, decode
from ..packing.layout import meta_width
from ..pattern import NMPattern
from . import native, wide
from .nm_linear import nm_linear
from .select import MOST_TOKENS_CODED, choose
from .watch import compiles_without_derivatives, may_go_direct, nothing_watches, wants_torch_alone
from .wide import matmul

_NUMBERS = 1 << 25  # values made of the codes that exist at a time


def coded_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    kind: str,
    group: int,
) -> Tensor:
    """X Wᵀ + b with W packed n:m, its values codes · scales; or with W dense, without `weight_meta`.

    Few tokens are rounded to bytes themselves, in groups of as many inputs as share a scale, each by the largest of its
    own: their products with the codes are then exact, and an output differs from that of the values by at most 1/254 of
    the sum of |w|·max|x| over the groups. More tokens are multiplied by the values, some rows of the weight at a time.
    Differentiable in x and bias, as [`nm_linear`] is.

    Args:
        x: (..., in).
        codes: (out, ⌈in·n/m · bits/8⌉), int8, or uint8 of two codes each.
        scale: (out, ⌈in/group⌉).
        weight_meta: (out, ⌈in/8⌉), uint8, or None.
        bias: (out,) or None.
        n: Number kept of every m inputs.
        m: Size of a group.
        kind: `"int8"` or `"int4"`.
        group: Inputs that share a scale.

    Returns:
        (..., out), in the dtype of x.

    Raises:
        ShapeError: x is not of floats, or the codes are not of their kind.
    """
    if not x.is_floating_point():
        raise ShapeError(
            f"a layer of integers got inputs of {x.dtype}; a model that casts its hidden states to the dtype of the "
            "layer's weight cannot have integers there: leave the layer to `ignore`, or the head to floats"
        )
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype is not torch.float64:  # what torch's own autocast casts
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if (
        compiles_without_derivatives()
        if torch.compiler.is_compiling()
        else may_go_direct(x, codes, MOST_TOKENS_CODED if x.dtype in native.most_direct else 0)
    ):
        bits = 8 if kind == "int8" else 4
        return torch.ops.optimum_eggs.packed_linear(x, codes, scale, weight_meta, bias, n, m, bits, group)
    if nothing_watches(x, codes, bias):
        return run(x, codes, scale, weight_meta, bias, n, m, kind, group)
    if wants_torch_alone():
        values = _decode(codes, scale, x.shape[-1] // m * n, n, m, kind, group, x.dtype)
        if weight_meta is None:
            return torch.nn.functional.linear(x, values, bias)
        return nm_linear(x, values, weight_meta, bias, n, m)
    return torch.ops.optimum_eggs.coded_linear(x, codes, scale, weight_meta, bias, n, m, kind, group)


def values_of(
    codes: Tensor, scale: Tensor, in_features: int, n: int, m: int, kind: str, group: int, dtype: torch.dtype
) -> Tensor:
    """The values (out, in·n/m) that codes stand for, in `dtype`."""
    coding, width = Coding(kind, group), in_features // m * n
    if codes.dtype is not coding.dtype:
        raise ShapeError(f"codes of {kind} are of {coding.dtype}, and these are of {codes.dtype}; load the model again")
    isa = choose(dtype, codes.device, tokens=1).isa if nothing_watches(codes, scale) else None
    fits = (
        codes.shape == (len(codes), coding.width(width))
        and scale.dtype is torch.bfloat16
        and scale.shape == (len(codes), coding.scales(in_features))
        and scale.device == codes.device
    )
    if isa is None or not fits:
        return _decode(codes, scale, width, n, m, kind, group, dtype)
    values = torch.empty(len(codes), width, dtype=dtype)
    native.decode(isa, codes.contiguous(), scale.contiguous(), values, _per_scale(coding, n, m), coding.bits)
    return values


def _decode(
    codes: Tensor, scale: Tensor, width: int, n: int, m: int, kind: str, group: int, dtype: torch.dtype
) -> Tensor:
    """The values by operations of torch."""
    coding = Coding(kind, group)
    return decode(codes, scale, width, coding, _per_scale(coding, n, m), dtype)


def _per_scale(coding: Coding, n: int, m: int) -> int:
    return coding.per_scale(NMPattern(n, m) if n < m else None)


def run(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    kind: str,
    group: int,
) -> Tensor:
    """Y by the kernel, or by values made of the codes."""
    in_features = x.shape[-1]
    tokens = x.numel() // in_features if x.dim() and in_features else 0
    choice = choose(x.dtype, x.device, tokens)
    coding = Coding(kind, group)
    fits = _belong_together(x, codes, scale, weight_meta, bias, n, m, coding)
    if fits and choice.backend == "native" and 0 < tokens <= MOST_TOKENS_CODED:
        assert choice.isa is not None
        x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
        weight_meta = None if weight_meta is None else weight_meta.contiguous()
        bias = None if bias is None else bias.contiguous()
        return native.coded_linear(choice.isa, x, codes, scale, weight_meta, bias, n, m, coding.bits, group)
    height = max(1, _NUMBERS // max(1, in_features // m * n))
    multiply = wide.linear if fits and choice.wide else torch.nn.functional.linear
    parts = []
    for start in range(0, max(1, len(codes)), height):  # an output head as a whole would take gigabytes
        rows = slice(start, start + height)
        values = values_of(codes[rows], scale[rows], in_features, n, m, kind, group, x.dtype)
        own = None if bias is None else bias[rows]
        if weight_meta is None:
            parts.append(multiply(x, values, own))
        else:
            parts.append(nm_linear(x, values, weight_meta[rows], own, n, m))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _belong_together(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    coding: Coding,
) -> bool:
    """Whether shapes, dtypes and devices are as the kernels take for granted: they read by address."""
    columns, rows, device = x.shape[-1] if x.dim() else 0, len(codes), x.device
    return (
        columns % m == 0
        and codes.dtype is coding.dtype
        and codes.shape == (rows, coding.width(columns // m * n))
        and scale.dtype is torch.bfloat16
        and scale.shape == (rows, coding.scales(columns))
        and codes.device == scale.device == device
        and (weight_meta is None) == (n == m)
        and (
            weight_meta is None
            or (
                weight_meta.dtype is torch.uint8
                and weight_meta.device == device
                and weight_meta.shape == (rows, meta_width(columns))
            )
        )
        and (bias is None or (bias.dtype is x.dtype and bias.device == device and bias.shape == (rows,)))
    )


@torch.library.custom_op("optimum_eggs::coded_linear", mutates_args=())
def _op(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    kind: str,
    group: int,
) -> Tensor:
    with torch.no_grad():
        return run(x, codes, scale, weight_meta, bias, n, m, kind, group)


@_op.register_fake
def _fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@register_flop_formula(torch.ops.optimum_eggs.coded_linear)
def _flops(x: Any, codes: Any, scale: Any, meta: Any, bias: Any, n: int, m: int, *_: Any, **__: Any) -> int:
    """Two for every value kept and token, given shapes."""
    return 2 * math.prod(x) // m * n * codes[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, weight_meta, bias, *rest = inputs
    ctx.save_for_backward(codes, scale, weight_meta)
    ctx.rest, ctx.in_features, ctx.has_bias = rest, x.shape[-1], bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from .layout import spread

    codes, scale, weight_meta = ctx.saved_tensors
    n, m, kind, group = ctx.rest
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        height = max(1, _NUMBERS // ctx.in_features)
        for start in range(0, len(codes), height):
            rows = slice(start, start + height)
            values = values_of(codes[rows], scale[rows], ctx.in_features, n, m, kind, group, grad.dtype)
            if weight_meta is not None:  # places, a byte each, would be more than the codes
                values = spread(values, weight_meta, NMPattern(n, m), rows, hold=False)
            part = matmul(grad[..., rows], values)
            grad_x = part if grad_x is None else grad_x.add_(part)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
