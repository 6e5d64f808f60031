"""The dense linear operation for few tokens: what is left dense in a packed model, such as its head."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, wide
from .select import dense_is_wide, dense_kernel
from .watch import compiles_without_derivatives, nothing_watches


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b: `F.linear`, but for few tokens in 16 bits on a CPU, which a kernel multiplies as fast as it reads W.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out). The kernel sums in float32, in another order than `F.linear`.
    """
    ours = compiles_without_derivatives() and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if ours and x.dtype is weight.dtype is not torch.float32 and type(weight) in (Tensor, torch.nn.Parameter):
        return torch.ops.optimum_eggs.packed_linear(x, weight, None, None, bias, 1, 1, 0, 0)
    return run(x, weight, bias) if nothing_watches(x, weight, bias) else torch.nn.functional.linear(x, weight, bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Y by the kernel, where it is faster and takes the tensors, or by torch."""
    if _belong_together(x, weight, bias):
        tokens = x.numel() // x.shape[-1]
        isa = dense_kernel(x.dtype, x.device, tokens)
        if isa is not None:
            return native.linear(isa, x.contiguous(), weight, None, None if bias is None else bias.contiguous(), 1, 1)
        if dense_is_wide(x.dtype, x.device, tokens):
            return wide.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _belong_together(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes, dtypes and devices are as the kernels take for granted, which read by address; no autocast."""
    return (
        x.numel() > 0
        and x.dim() > 0
        and weight.shape[1:] == x.shape[-1:]
        and weight.is_contiguous()
        and weight.dtype is x.dtype
        and weight.device == x.device
        and not torch.is_autocast_enabled(x.device.type)
        and (bias is None or (bias.dtype is x.dtype and bias.device == x.device and bias.shape == weight.shape[:1]))
    )
