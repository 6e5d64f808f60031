"""A block in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """All floating-point parameters of `block` in float32; afterwards, what they hold is rounded back to their dtypes.

    A parameter that has not changed comes back bit for bit. Memory: a float32 copy of what is stored otherwise.
    """
    stored = [(p, p.data) for p in block.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    try:
        for parameter, data in stored:
            parameter.data = data.to(torch.float32)
        yield
    finally:
        for parameter, data in stored:
            data.copy_(parameter.data)
            parameter.data = data
