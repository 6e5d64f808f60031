"""`torch.ops.optimum_eggs.packed_linears`: two or three layers of the same inputs in one product without derivatives.

On a CPU its kernel is C++, as that of `packed_linear` is. Layers that are neighbours in memory are one matrix to it, of
the rows of all, so that the threads are woken once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define

_OF_EACH = ("Tensor? scale", "Tensor? meta", "Tensor? bias")
_ARGUMENTS = ", ".join(
    [
        "Tensor x, Tensor weight, Tensor weight_2, Tensor? weight_3",
        *(f"{what}, {what}_2, {what}_3" for what in _OF_EACH),
        "int n, int m, int bits, int group",
    ]
)
MOST_LAYERS = 3


def _by_python(x: Tensor, *arguments: Tensor | int | None) -> Tensor:
    """The outputs side by side (..., sum of out)."""
    stored, numbers = arguments[:-4], arguments[-4:]
    layers = zip(*(stored[i : i + MOST_LAYERS] for i in range(0, len(stored), MOST_LAYERS)), strict=True)
    each = [torch.ops.optimum_eggs.packed_linear(x, *layer, *numbers) for layer in layers if layer[0] is not None]
    return torch.cat(each, -1)


def _fake(x: Tensor, *arguments: Tensor | int | None) -> Tensor:
    return x.new_empty(
        (*x.shape[:-1], sum(len(weight) for weight in arguments[:MOST_LAYERS] if isinstance(weight, Tensor)))
    )


define("packed_linears", _ARGUMENTS, _by_python, _fake)
