"""Whether torch watches a call: then everything must go through its dispatcher, which a call by address does not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def nothing_watches(*tensors: Tensor | None) -> bool:
    """Whether kernels may be called on the tensors by address: plain ones, no gradient, no compiler, no mode."""
    if torch.compiler.is_compiling():
        return False
    asks = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:  # a subclass computes in its own way
            return False
        if asks and tensor.requires_grad:
            return False
    return not (
        forward_derivatives()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def compiles_without_derivatives() -> bool:
    """Whether torch compiles a call to run it here, and no derivatives are asked for, backward or forward."""
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def may_go_direct(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether an eager product of x with a packed weight is one that the operation's own kernel takes, without Python.

    Args:
        x: (..., in).
        weight: The parameter.
        most: The most tokens.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and 0 < x.numel() <= most * x.shape[-1]
        and forward_ad._current_level < 0  # as in `forward_derivatives`
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def may_hold(*tensors: Tensor) -> bool:
    """Whether what is made of the tensors may serve later calls: plain ones, no compiler, no transform, no mode."""
    if torch.compiler.is_compiling():
        return False
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors):
        return False
    return not (
        forward_derivatives()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def forward_derivatives() -> bool:
    """Whether tensors may carry tangents: derivatives that are computed forward, beside the values."""
    return forward_ad._current_level >= 0


def wants_torch_alone() -> bool:
    """Whether what watches takes torch's own operations alone: all derivatives but backward ones, and ONNX."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        return True
    levels = get_interpreter_stack() or []  # of torch.func's transforms
    return forward_derivatives() or any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in levels)


def transforms() -> bool:
    """Whether a transform of torch.func is at work, `vmap` included."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
