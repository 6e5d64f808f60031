"""Values as small integers: W = code · scale, with one scale for every `group` inputs of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import BITS, GROUP
from ..errors import ConfigError
from ..pattern import NMPattern

MOST = 65536
"""Inputs that may share a scale."""


@dataclass(frozen=True)
class Coding:
    """How values are coded: their kind, and how many inputs share a scale.

    Codes are symmetric about zero but for the lowest: from −128 to 127, or from −8 to 7.

    Args:
        kind: `"int8"` or `"int4"`.
        group: Inputs that share a scale, a multiple of 64 up to `MOST`; the last group of a row may have fewer.

    Raises:
        ConfigError: there is no such kind, or no such group.

    >>> Coding("int4", 64).bits
    4
    """

    kind: str
    group: int = GROUP

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise ConfigError(f"values={self.kind!r} is unknown; use one of {list(BITS)}, or None for floats")
        known = isinstance(self.group, int) and not isinstance(self.group, bool)
        if not known or self.group % 64 or not 64 <= self.group <= MOST:
            raise ConfigError(
                f"value_group={self.group!r} is no multiple of 64 inputs of up to {MOST}; use 64, 128 or more"
            )

    @classmethod
    def parse(cls, text: str) -> Coding:
        """What `str` writes.

        Raises:
            ConfigError: `text` is no such thing.

        >>> str(Coding.parse("int4:64"))
        'int4:64'
        """
        kind, colon, group = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not colon or not group.isdecimal():
            raise ConfigError(f"coding={text!r} is not of the form 'int8:128'")
        return cls(kind, int(group))

    def __str__(self) -> str:
        return f"{self.kind}:{self.group}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that codes are stored in: two of four bits are a byte."""
        return torch.int8 if self.bits == 8 else torch.uint8

    @property
    def lowest(self) -> int:
        """The lowest code; the highest is one less than its opposite."""
        return -(1 << (self.bits - 1))

    def width(self, values: int) -> int:
        """Columns of the codes of rows of so many values.

        >>> Coding("int8").width(7), Coding("int4").width(7)
        (7, 4)
        """
        return -(-values * self.bits // 8)

    def held(self, width: int) -> int:
        """Values of rows of so many columns, where their number is even.

        >>> Coding("int8").held(8), Coding("int4").held(8)
        (8, 16)
        """
        return width * 8 // self.bits

    def scales(self, in_features: int) -> int:
        """Scales of a row.

        >>> Coding("int8", 128).scales(576)
        5
        """
        return -(-in_features // self.group)

    def per_scale(self, pattern: NMPattern | None) -> int:
        """Values that share a scale, of a row that keeps n of every m; all are kept without a pattern.

        >>> Coding("int8", 128).per_scale(NMPattern(2, 4))
        64
        """
        return self.group if pattern is None else self.group // pattern.m * pattern.n


def store_codes(codes: Tensor, coding: Coding) -> Tensor:
    """Codes (out, values), int8, as they are stored: of four bits two in a byte, the first low, each with 8 added.

    >>> store_codes(torch.tensor([[-8, 7, 1]], dtype=torch.int8), Coding("int4"))
    tensor([[240,   9]], dtype=torch.uint8)
    """
    if coding.bits == 8:
        return codes
    shifted = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[1] % 2))
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def read_codes(stored: Tensor, values: int, coding: Coding) -> Tensor:
    """Codes (out, values), int8, of what is stored.

    >>> read_codes(torch.tensor([[240, 9]], dtype=torch.uint8), 3, Coding("int4"))
    tensor([[-8,  7,  1]], dtype=torch.int8)
    """
    if coding.bits == 8:
        return stored
    pairs = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)
    return pairs[:, :values].to(torch.int8) - 8


def decode(stored: Tensor, scale: Tensor, values: int, coding: Coding, per_scale: int, dtype: torch.dtype) -> Tensor:
    """The values (out, values) that codes stand for: products in float32, rounded to `dtype`. scale (out, scales)."""
    codes = read_codes(stored, values, coding).to(torch.float32)
    return codes.mul_(scale.to(torch.float32).repeat_interleave(per_scale, 1)[:, :values]).to(dtype)


def straight_through(values: Tensor, scale: Tensor, coding: Coding, per_scale: int) -> Tensor:
    """The values nearest to `values` (out, columns) that codes and scales can be, as stored; differentiable in both.

    The gradient passes straight through the rounding (Bengio et al. 2013, arXiv 1308.3432) to what lies in the range of
    the codes, and to a scale (out, scales) as to a learned step size (Esser et al. 2020, arXiv 1902.08153).

    >>> values = torch.tensor([[0.9, -0.2]], requires_grad=True)
    >>> straight_through(values, torch.tensor([[0.5]]), Coding("int8"), 64)
    tensor([[1., 0.]], grad_fn=<MulBackward0>)
    """
    scale = scale + (scale.to(torch.bfloat16).to(scale.dtype) - scale).detach()
    spaced = scale.repeat_interleave(per_scale, 1)[:, : values.shape[1]]
    codes = (values / torch.where(spaced == 0, 1, spaced)).clamp(coding.lowest, -(coding.lowest + 1))
    return (codes + (codes.round() - codes).detach()) * spaced


def nearest_codes(values: Tensor, scale: Tensor, coding: Coding, per_scale: int) -> Tensor:
    """Codes (out, columns), int8, nearest to `values` at scales (out, scales); those of a scale of zero are zero.

    >>> nearest_codes(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.5]]), Coding("int8"), 64)
    tensor([[2, 0]], dtype=torch.int8)
    """
    return _stored_range(in_steps(values, scale, per_scale).round_(), coding)


def drawn_codes(values: Tensor, scale: Tensor, coding: Coding, per_scale: int) -> Tensor:
    """Codes (out, columns), int8, each the one below or above its value, by a draw with the odds of how near it is.

    On average that is the value, so that changes smaller than half a step are not lost, as they are by the nearest
    codes (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551). What is a code already stays. The draw is the
    same each time.

    >>> 20 < drawn_codes(torch.full((1, 400), 0.1), torch.tensor([[1.0]]), Coding("int8"), 400).sum() < 60
    tensor(True)
    """
    generator = torch.Generator(device=values.device).manual_seed(0)
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    steps = in_steps(values, scale, per_scale)
    below = steps.floor()
    return _stored_range(below + (draw < steps - below), coding)


def in_steps(values: Tensor, scale: Tensor, per_scale: int) -> Tensor:
    """Values (out, columns) in multiples of scales (out, scales); zeros where a scale is zero."""
    spaced = scale.repeat_interleave(per_scale, 1)[:, : values.shape[1]]
    return torch.where(spaced == 0, 0, values / spaced)


def _stored_range(codes: Tensor, coding: Coding) -> Tensor:
    return codes.clamp_(coding.lowest, -(coding.lowest + 1)).to(torch.int8)


def whole_range(values: Tensor, coding: Coding, per_scale: int) -> Tensor:
    """Scales (out, scales), bfloat16, at which the largest of every `per_scale` values is the highest code.

    >>> whole_range(torch.tensor([[0.5, -1.0]]), Coding("int4"), 64)
    tensor([[0.1426]], dtype=torch.bfloat16)
    """
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % per_scale))
    return (padded.unflatten(1, (-1, per_scale)).amax(2) / -(coding.lowest + 1)).to(torch.bfloat16)
