"""`torch.ops.optimum_eggs.packed_linear`: the products without derivatives, as compiled code calls them.

On a CPU its kernel is C++, and a compiled model calls it without Python where that was built; what no kernel takes, and
other devices, get to what the layers themselves call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import ShapeError
from .coded_linear import run as run_coded
from .dense_linear import run as run_dense
from .library import LIBRARY, define
from .nm_linear import run as run_packed

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? scale, Tensor? meta, Tensor? bias, int n, int m, int bits, int group"


def _by_python(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    bits: int,
    group: int,
) -> Tensor:
    """X Wᵀ + b: of integers if there are `bits`, packed if there is `meta`, else dense."""
    with torch.no_grad():
        if bits:
            assert scale is not None
            return run_coded(x, weight, scale, meta, bias, n, m, f"int{bits}", group)
        if meta is None:
            return run_dense(x, weight, bias)
        return run_packed(x, weight, meta, bias, n, m)


def _fake(x: Tensor, weight: Tensor, scale: Any, meta: Any, bias: Any, n: int, m: int, bits: int, group: int) -> Tensor:
    width = x.shape[-1] // m * n
    if weight.shape[1] != ((width * bits + 7) // 8 if bits else width):
        raise ShapeError(f"inputs {tuple(x.shape)} do not fit a weight stored as {tuple(weight.shape)}, {n}:{m}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    x = arguments[0].movedim(in_dims[0], 0) if in_dims[0] is not None else arguments[0]
    if all(dim is None for dim in in_dims[1:]):
        return torch.ops.optimum_eggs.packed_linear(x, *arguments[1:]), 0
    calls = (
        [given if dim is None else given.select(dim, i) for given, dim in zip(arguments, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    return torch.stack([torch.ops.optimum_eggs.packed_linear(*call) for call in calls]), 0


define("packed_linear", _ARGUMENTS, _by_python, _fake)
torch.library.register_vmap("optimum_eggs::packed_linear", _vmap, lib=LIBRARY)


@register_flop_formula(torch.ops.optimum_eggs.packed_linear)
def _flops(x: Any, weight: Any, scale: Any, meta: Any, bias: Any, n: int, m: int, *_: Any, **__: Any) -> int:
    """Two for every value kept and token, given shapes."""
    return 2 * math.prod(x) // m * n * weight[0]
