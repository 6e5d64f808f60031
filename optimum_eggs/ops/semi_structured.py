"""A packed 2:4 layer as torch's own semi-structured tensor, for prompts on a GPU with sparse tensor cores.

torch keeps the values as the packed format does, so they are shared; only the bits are written in another order, a
sixteenth of the dense size. Run on no GPU so far: the layout is tested against torch's own conversion on the CPU, the
product is not. It is therefore never chosen by itself; `OPTIMUM_EGGS_BACKEND=semi_structured` asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.pack import unpack_mask
from . import held

_MIN_ROWS, _MIN_COLUMNS = 32, 64  # both dimensions are multiples of these, for 16-bit values


def fits(weight: Tensor, n: int, m: int) -> bool:
    """Whether torch has a semi-structured product for the packed weight (out, in/2): 2:4, 16 bits, whole tiles."""
    return (
        (n, m) == (2, 4)
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[0] % _MIN_ROWS == 0
        and 2 * weight.shape[1] % _MIN_COLUMNS == 0
    )


def semi_structured(weight: Tensor, weight_meta: Tensor) -> Tensor:
    """The tensor that torch multiplies by: (out, in), sharing the packed values (out, in/2)."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    rows, columns = weight.shape[0], 2 * weight.shape[1]

    def reorder() -> Tensor:
        return sparse_semi_structured_from_dense_cutlass(unpack_mask(weight_meta, columns).to(weight.dtype))[1]

    return SparseSemiStructuredTensorCUTLASS(
        torch.Size((rows, columns)),
        packed=weight,
        meta=held.hold(("reordered", columns, weight.dtype), reorder, weight_meta),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def linear(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None) -> Tensor:
    """X (..., in) to (..., out), by torch's product of a dense and a semi-structured matrix."""
    return torch.nn.functional.linear(x, semi_structured(weight, weight_meta), bias)
