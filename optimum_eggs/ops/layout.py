"""Packed to dense and back, in C where nothing stands against it, else by positions that are worked out once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.layout import meta_width, packed_width
from ..packing.pack import kept_positions, unpack
from ..pattern import NMPattern
from . import held, native
from .select import choose, holds
from .watch import may_hold, nothing_watches

_ALL = slice(None)
_NUMBERS = 1 << 22  # of positions that are worked out at a time


def spread(values: Tensor, weight_meta: Tensor, pattern: NMPattern, rows: slice = _ALL, *, hold: bool = True) -> Tensor:
    """The dense matrix (out, in), zeros in place, of values (out, in·n/m) and bits (out, ⌈in/8⌉). Differentiable.

    Args:
        values: What the kept positions hold, of the `rows` alone.
        weight_meta: Bits of all rows.
        pattern: n kept of every m inputs.
        rows: Those that are meant; all if not given.
        hold: Where torch must do it, hold the places of the values for later calls.

    >>> spread(torch.tensor([[1.0, 4.0]]), torch.tensor([[9]], dtype=torch.uint8), NMPattern(2, 4))
    tensor([[1., 0., 0., 4.]])
    """
    in_features = values.shape[1] // pattern.n * pattern.m
    bits = weight_meta[rows]
    isa = _isa(values, bits, in_features)
    if isa is None:
        places = _hold_places(values, weight_meta, in_features, pattern) if hold else None
        return _by_places(values, places, bits, pattern, rows)
    dense = values.new_empty(len(values), in_features)
    native.unpack(isa, values.contiguous(), bits.contiguous(), dense)
    return dense


def gather(dense: Tensor, weight_meta: Tensor, pattern: NMPattern, rows: slice = _ALL) -> Tensor:
    """What a dense matrix (out, in) holds at the kept positions, packed (out, in·n/m). Differentiable.

    Args:
        dense: The matrix, of the `rows` alone.
        weight_meta: Bits of all rows (out, ⌈in/8⌉).
        pattern: n kept of every m inputs.
        rows: Those that are meant; all if not given.

    >>> gather(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9]], dtype=torch.uint8), NMPattern(2, 4))
    tensor([[1., 4.]])
    """
    in_features = dense.shape[1]
    bits = weight_meta[rows]
    if _isa(dense, bits, in_features) is None:
        places = _hold_places(dense, weight_meta, in_features, pattern)
        if places is None:
            return dense.gather(1, kept_positions(bits, in_features, pattern))
        return dense.gather(1, _columns(places[rows], pattern))
    values = dense.new_empty(len(dense), packed_width(in_features, pattern))
    native.pack(dense.contiguous(), bits.contiguous(), values)
    return values


def unpack_by_torch(values: Tensor, weight_meta: Tensor, pattern: NMPattern) -> Tensor:
    """`unpack`, by the places that training has worked out if there are any. It holds none by itself."""
    in_features = values.shape[1] // pattern.n * pattern.m
    places = held.find(("places", in_features, pattern), weight_meta) if holds() and may_hold(weight_meta) else None
    return _by_places(values, places, weight_meta, pattern)


def _by_places(values: Tensor, places: Tensor | None, bits: Tensor, pattern: NMPattern, rows: slice = _ALL) -> Tensor:
    if places is None:
        return unpack(values, bits, pattern)
    columns = _columns(places[rows], pattern)
    return values.new_zeros(len(values), values.shape[1] // pattern.n * pattern.m).scatter(1, columns, values)


def _columns(places: Tensor, pattern: NMPattern) -> Tensor:
    """Column of every kept value (out, in·n/m), int32, of places (out, in/m, n)."""
    first = torch.arange(0, places.shape[1] * pattern.m, pattern.m, dtype=torch.int32, device=places.device)
    return (places + first[:, None]).flatten(1)


def _hold_places(matrix: Tensor, weight_meta: Tensor, in_features: int, pattern: NMPattern) -> Tensor | None:
    """The place of every kept value in its group (out, in/m, n), uint8, held; None where none may be."""
    if not holds() or not may_hold(matrix, weight_meta) or torch._C._functorch.is_legacy_batchedtensor(matrix):
        return None
    if weight_meta.dtype is not torch.uint8 or weight_meta.shape[1] != meta_width(in_features):
        return None

    def make() -> Tensor:
        some = weight_meta.split(max(1, _NUMBERS // in_features))  # rows: positions are int64 meanwhile
        places = [(kept_positions(bits, in_features, pattern) % pattern.m).to(torch.uint8) for bits in some]
        return torch.cat(places).unflatten(1, (-1, pattern.n))

    return held.hold(("places", in_features, pattern), make, weight_meta)


def _isa(matrix: Tensor, weight_meta: Tensor, in_features: int) -> str | None:
    """The instruction set to use, or None where torch must do it."""
    if not nothing_watches(matrix, weight_meta) or weight_meta.device != matrix.device:
        return None
    if torch._C._functorch.is_legacy_batchedtensor(matrix):  # a gradient of many, as `jacobian(vectorize=True)` has it
        return None
    if weight_meta.dtype is not torch.uint8 or weight_meta.shape != (len(matrix), meta_width(in_features)):
        return None
    return choose(matrix.dtype, matrix.device, tokens=1).isa
