"""Whether torch watches a call: then everything must go through its dispatcher, which a call by address does not."""

from __future__ import annotations

import torch
from torch import Tensor
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


def forward_derivatives() -> bool:
    """Whether tensors may carry tangents: derivatives that are computed forward, beside the values."""
    return forward_ad._current_level >= 0
