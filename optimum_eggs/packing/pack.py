"""Dense matrix and mask to packed values and bits, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pattern import NMPattern
from .layout import meta_width, packed_width
from .legal import check_legal


def pack(weight: Tensor, mask: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """Pack a dense weight under an N:M mask.

    weight (out, in), any float dtype; mask (out, in), boolean, exactly n set in every group of m. What the weight
    holds off the mask is dropped; a zero on the mask is kept as a value. Returns values (out, in·n/m) in the dtype of
    `weight`, and meta (out, ⌈in/8⌉), uint8.

    Raises:
        ShapeError: the shapes differ, the mask is not boolean, in is not a multiple of m, or a group does not keep
            exactly n.

    >>> values, meta = pack(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[True, False, False, True]]), NMPattern(2, 4))
    >>> values, meta
    (tensor([[1., 4.]]), tensor([[9]], dtype=torch.uint8))
    """
    if weight.dim() != 2 or weight.shape != mask.shape:
        raise ShapeError(f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} must both be (out, in)")
    width = packed_width(weight.shape[1], pattern)
    check_legal(mask, pattern)
    return weight[mask].view(-1, width), pack_mask(mask)


def unpack(values: Tensor, meta: Tensor, pattern: NMPattern) -> Tensor:
    """The dense weight (out, in), zeros in place. values (out, in·n/m); meta (out, ⌈in/8⌉). Differentiable in values.

    The bits are trusted here; a checkpoint's are checked when it is read.
    """
    mask = unpack_mask(meta, values.shape[1] // pattern.n * pattern.m)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask (out, in) as bits (out, ⌈in/8⌉), uint8: position 8b + i is bit i (value 2^i) of byte b.

    >>> pack_mask(torch.tensor([[True, False, True, False, False, False, False, False, True]]))
    tensor([[5, 1]], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    bits = padded.unflatten(1, (meta_width(mask.shape[1]), 8)).to(torch.uint8)
    return bits.mul_(_bit_values(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(meta: Tensor, in_features: int) -> Tensor:
    """The boolean mask (out, in) of packed bits (out, ⌈in/8⌉).

    >>> unpack_mask(torch.tensor([[9]], dtype=torch.uint8), 4)
    tensor([[ True, False, False,  True]])
    """
    return (meta.unsqueeze(-1) & _bit_values(meta.device)).ne_(0).bool().flatten(1)[:, :in_features]


def kept_positions(meta: Tensor, in_features: int, pattern: NMPattern) -> Tensor:
    """Column of every packed value, (out, in·n/m), int64, from bits (out, ⌈in/8⌉). Its shape does not hang on the bits.

    >>> kept_positions(torch.tensor([[0b10010110]], dtype=torch.uint8), 8, NMPattern(2, 4))
    tensor([[1, 2, 4, 7]])
    """
    mask = unpack_mask(meta, in_features).unflatten(1, (-1, pattern.m))
    places = torch.arange(pattern.m, dtype=torch.int32, device=meta.device)
    # Those kept come first, in their order. No stable sort: ONNX has none.
    within = (mask.int() * pattern.m - places).topk(pattern.n).indices
    first = torch.arange(0, in_features, pattern.m, device=meta.device)
    return (within + first[:, None]).flatten(1)


def _bit_values(device: torch.device) -> Tensor:
    # Made on the device: a copy from the processor would make it wait, and no CUDA graph could capture it.
    return (2 ** torch.arange(8, dtype=torch.int32, device=device)).to(torch.uint8)
