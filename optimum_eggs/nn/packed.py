"""Which modules of a model are packed, and which hold integers."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from ..packing import packed_width
from ..pattern import NMPattern
from .coded import CodedLinear
from .embedding import CodedEmbedding, TiedCodedLinear
from .linear import NMLinear

PackedLinear: TypeAlias = NMLinear | CodedLinear
"""A packed layer, its values floats or integers."""


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def is_packed(module: nn.Module | None) -> bool:
    """Whether `module` is a packed layer."""
    return isinstance(module, NMLinear) or (isinstance(module, CodedLinear) and module.pattern is not None)


def pattern_of(layer: PackedLinear) -> NMPattern:
    """The pattern of a packed layer."""
    assert layer.pattern is not None
    return layer.pattern


def values_kept(layer: PackedLinear) -> int:
    """How many values a packed layer holds."""
    return layer.out_features * packed_width(layer.in_features, pattern_of(layer))


def coded_modules(model: nn.Module) -> dict[str, CodedLinear | CodedEmbedding]:
    """The modules of a model whose values are integers, by dotted name, without a head that shares the embeddings'."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CodedLinear | CodedEmbedding) and not isinstance(module, TiedCodedLinear)
    }
