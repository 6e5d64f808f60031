"""Packed to dense and back, in C where nothing stands against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import kept_positions, meta_width, packed_width, unpack
from ..pattern import NMPattern
from . import native
from .select import choose
from .watch import nothing_watches


def spread(values: Tensor, weight_meta: Tensor, pattern: NMPattern) -> Tensor:
    """The dense matrix (out, in), zeros in place, of values (out, in·n/m) and bits (out, ⌈in/8⌉). Differentiable.

    >>> spread(torch.tensor([[1.0, 4.0]]), torch.tensor([[9]], dtype=torch.uint8), NMPattern(2, 4))
    tensor([[1., 0., 0., 4.]])
    """
    in_features = values.shape[1] // pattern.n * pattern.m
    isa = _isa(values, weight_meta, in_features)
    if isa is None:
        return unpack(values, weight_meta, pattern)
    dense = values.new_empty(len(values), in_features)
    native.unpack(isa, values.contiguous(), weight_meta.contiguous(), dense)
    return dense


def gather(dense: Tensor, weight_meta: Tensor, pattern: NMPattern) -> Tensor:
    """What a dense matrix (out, in) holds at the kept positions, packed (out, in·n/m). Differentiable.

    >>> gather(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9]], dtype=torch.uint8), NMPattern(2, 4))
    tensor([[1., 4.]])
    """
    in_features = dense.shape[1]
    if _isa(dense, weight_meta, in_features) is None:
        return dense.gather(1, kept_positions(weight_meta, in_features, pattern))
    values = dense.new_empty(len(dense), packed_width(in_features, pattern))
    native.pack(dense.contiguous(), weight_meta.contiguous(), values)
    return values


def _isa(matrix: Tensor, weight_meta: Tensor, in_features: int) -> str | None:
    """The instruction set to use, or None where torch must do it."""
    if not nothing_watches(matrix, weight_meta) or weight_meta.device != matrix.device:
        return None
    if torch._C._functorch.is_legacy_batchedtensor(matrix):  # a gradient of many, as `jacobian(vectorize=True)` has it
        return None
    if weight_meta.dtype is not torch.uint8 or weight_meta.shape != (len(matrix), meta_width(in_features)):
        return None
    return choose(matrix.dtype, matrix.device, tokens=1).isa
