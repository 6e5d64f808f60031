"""The packed linear operation: `torch.ops.optimum_eggs.nm_linear`, and the short way to it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..packing.layout import meta_width
from ..pattern import NMPattern
from . import held, native, semi_structured, triton
from .layout import gather, spread, unpack_by_torch
from .select import Choice, choose
from .watch import compiles_without_derivatives, may_go_direct, may_hold, nothing_watches, wants_torch_alone
from .wide import by_parts, matmul

_PANEL_BYTES = 4 << 20  # a panel of unpacked rows: small enough to stay in the cache until it is multiplied
_GRAD_NUMBERS = 1 << 22  # of the dense gradient that exist at a time, in the backward pass


def nm_linear(
    x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int, hold: bool = False
) -> Tensor:
    """X Wᵀ + b with W packed n:m.

    Differentiable in x, weight and bias; works under `torch.compile`, `torch.export`, `torch.func` and autocast.
    [`optimum_eggs.ops.explain`] tells which backend runs. For the derivatives of `torch.func`, in forward-mode
    differentiation and in ONNX, it is made of torch's own operations, on the dense matrix.

    Args:
        x: (..., in).
        weight: (out, in·n/m), the values kept.
        weight_meta: (out, ⌈in/8⌉), uint8. The bits are trusted; a checkpoint's are checked when it is read.
        bias: (out,) or None.
        n: Number kept of every m inputs.
        m: Size of a group.
        hold: Where the backend is `dense`, hold the dense weight for later calls, as long as `weight` is as it is. For
            weights that are not trained, and not made for this call alone.

    Returns:
        (..., out), in the dtype of x. The `reference` and `dense` backends equal `F.linear` on the dense matrix, zeros
        in place, bit for bit; the others sum in float32, in another order.
    """
    own = weight
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if autocast and x.is_floating_point() and x.dtype is not torch.float64:  # what torch's own autocast casts
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if (
        compiles_without_derivatives()
        if torch.compiler.is_compiling()
        else may_go_direct(x, weight, native.most_direct.get(x.dtype, 0))
    ):
        return torch.ops.optimum_eggs.packed_linear(x, weight, None, weight_meta, bias, n, m, 0, 0)
    if nothing_watches(x, weight, bias):
        return run(x, weight, weight_meta, bias, n, m, own if hold else None)
    if wants_torch_alone():
        return _by_torch(x, weight, weight_meta, bias, n, m)
    if may_hold(x, own, weight_meta):  # not in the operation, which a compiled graph may run in its own memory
        if torch.is_grad_enabled() and own.requires_grad:
            held.forget(own)
        elif hold and _is_dense(x, weight, weight_meta, bias, n, m):  # gradients of x read it too
            return torch.nn.functional.linear(x, held.hold_dense(own, weight_meta, n, m, x.dtype), bias)
    return torch.ops.optimum_eggs.nm_linear(x, weight, weight_meta, bias, n, m)


def run(
    x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int, own: Tensor | None = None
) -> Tensor:
    """Y by the backend chosen. `own`: the weight, before a cast, to hold a dense one of; without it none is held."""
    tokens = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    choice = choose(x.dtype, x.device, tokens, x.shape[-1] if tokens else 0, n, m)
    if choice.backend == "dense" and weight.dtype is x.dtype:
        dense = held.find_dense(weight if own is None else own, weight_meta, n, m, x.dtype)
        if dense is not None:
            return torch.nn.functional.linear(x, dense, bias)
    fits = tokens and _belong_together(x, weight, weight_meta, bias, n, m)
    if choice.backend == "semi_structured":
        fits = fits and semi_structured.fits(weight, n, m)
    if choice.backend == "dense" and fits and own is not None:
        return torch.nn.functional.linear(x, held.hold_dense(own, weight_meta, n, m, x.dtype), bias)
    if choice.backend in ("reference", "dense") or not fits:  # the reference raises what `F.linear` raises
        return torch.nn.functional.linear(x, unpack_by_torch(weight, weight_meta, NMPattern(n, m)), bias)
    x, weight, weight_meta = x.contiguous(), weight.contiguous(), weight_meta.contiguous()
    bias = None if bias is None else bias.contiguous()
    if choice.backend == "triton":
        return triton.linear(x, weight, weight_meta, bias, n, m)
    if choice.backend == "semi_structured":
        return semi_structured.linear(x, weight, weight_meta, bias)
    if choice.wide:

        def multiply(flat: Tensor, values: Tensor, own: Tensor | None, rows: slice) -> Tensor:
            return _by_kernels(choice, flat, values, weight_meta[rows], own, n, m)

        return by_parts(x, weight, bias, multiply)
    return _by_kernels(choice, x, weight, weight_meta, bias, n, m)


def _by_kernels(
    choice: Choice, x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """Y of contiguous tensors that belong together, by a kernel for the processor or by panels."""
    assert choice.isa is not None
    if choice.backend == "native":
        return native.linear(choice.isa, x, weight, weight_meta, bias, n, m)
    return _by_panels(choice.isa, x, weight, weight_meta, bias)


def _by_torch(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """Y by operations of torch alone, whose shapes do not hang on the bits."""
    power = 2 ** torch.arange(8, dtype=torch.int32, device=weight_meta.device)
    # Plain numbers: ONNX knows more about them than about bits. The remainder first: the older of its exporters works
    # out ahead what a division of constants gives, which here takes 32 times the bytes of the bits.
    bits = weight_meta.unsqueeze(-1).int() % (2 * power) // power
    kept = bits.flatten(1)[:, : weight.shape[1] // n * m]
    place = (kept.cumsum(1) - 1).clamp(min=0)  # of each kept position among its row's values
    dense = torch.where(kept == 1, weight.gather(1, place), 0.0)
    return torch.nn.functional.linear(x, dense, bias)


def _belong_together(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> bool:
    """Whether shapes, dtypes and devices are as the kernels take for granted: they read by address."""
    (rows, width), columns, dtype, device = weight.shape, x.shape[-1], x.dtype, x.device
    return (
        weight.dtype is dtype
        and weight.device == device
        and weight_meta.device == device
        and columns % m == 0
        and columns * n == width * m
        and weight_meta.dtype is torch.uint8
        and weight_meta.shape == (rows, meta_width(columns))
        and (bias is None or (bias.dtype is dtype and bias.device == device and bias.shape == (rows,)))
    )


def _is_dense(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> bool:
    """Whether the layer multiplies by a dense weight that may be held."""
    fits = x.dim() and _belong_together(x, weight, weight_meta, bias, n, m)
    return bool(fits) and choose(x.dtype, x.device, 1).backend == "dense"


def _by_panels(isa: str, x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None) -> Tensor:
    """Y by torch's dense product, a panel of unpacked rows at a time."""
    out_features, in_features = weight.shape[0], x.shape[-1]
    flat = x.view(-1, in_features)
    y = x.new_empty((len(flat), out_features))
    height = min(out_features, max(64, _PANEL_BYTES // (in_features * x.element_size())))
    panel = x.new_empty((height, in_features))
    for start in range(0, out_features, height):
        rows = slice(start, min(start + height, out_features))
        dense = panel[: rows.stop - rows.start]
        native.unpack(isa, weight[rows], weight_meta[rows], dense)
        if bias is None:
            torch.mm(flat, dense.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], flat, dense.t(), out=y[:, rows])
    return y.view(*x.shape[:-1], out_features)


@torch.library.custom_op("optimum_eggs::nm_linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    with torch.no_grad():
        return run(x, weight, weight_meta, bias, n, m)


@_op.register_fake
def _fake(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    # Where CI is set, inductor refuses what has a decomposition that it does not use, unless it is on this list.
    inductor = sys.modules.get("torch._inductor.lowering")  # slow to import, and there by now if it compiles this
    if inductor is not None:
        inductor.FALLBACK_ALLOW_LIST.add("optimum_eggs::nm_linear")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.optimum_eggs.nm_linear)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two for every value kept and token, given shapes."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


_overload = torch.ops.optimum_eggs.nm_linear.default
torch._decomp.register_decomposition(_overload)(_by_torch)  # the ONNX exporter takes what is in this table alone
torch._decomp.register_decomposition(_overload, type="meta")(_fake)  # else fake tensors of unknown sizes take it too


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_meta, bias, ctx.n, ctx.m = inputs
    ctx.save_for_backward(x, weight, weight_meta)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, weight_meta = ctx.saved_tensors
    wanted, pattern = ctx.needs_input_grad, NMPattern(ctx.n, ctx.m)
    grad_x = grad_weight = grad_bias = None
    by_token = grad.reshape(-1, grad.shape[-1])  # (tokens, out); not flatten, which the older of torch's vmaps lacks
    if wanted[0]:
        grad_x = matmul(grad, spread(weight, weight_meta, pattern))  # dense for as long as this product takes
    if wanted[1]:
        left, right = by_token.t(), x.reshape(-1, x.shape[-1])
        height = max(1, _GRAD_NUMBERS // x.shape[-1])
        parts = []
        for start in range(0, len(left), height):
            rows = slice(start, start + height)
            parts.append(gather(matmul(left[rows], right), weight_meta, pattern, rows))
        grad_weight = torch.cat(parts)
    if ctx.has_bias and wanted[3]:
        grad_bias = by_token.sum(0)
    return grad_x, grad_weight, None, grad_bias, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    op = torch.ops.optimum_eggs.nm_linear
    if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
        return op(arguments[0].movedim(in_dims[0], 0), *arguments[1:]), 0
    calls = (
        [given if dim is None else given.select(dim, i) for given, dim in zip(arguments, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    return torch.stack([op(*call) for call in calls]), 0
