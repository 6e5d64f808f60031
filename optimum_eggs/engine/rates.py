"""Learning rates that are relative to the size of what they move.

A step of Adam is as large as its rate, whatever the gradient. Models differ tenfold in the size of their weights, so a
rate that is right for one of them does nothing or destroys another; as a share of each tensor's size it serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def sizes(tensors: Sequence[Tensor]) -> list[float]:
    """Root mean square of the entries of each tensor that are not zero; of one that is all zero, the others' median.

    >>> import torch
    >>> sizes([torch.tensor([3.0, 0.0, -3.0]), torch.zeros(2)])
    [3.0, 3.0]
    """
    found = [_size(tensor.detach()) for tensor in tensors]
    known = sorted(size for size in found if size) or [1.0]
    return [size or known[len(known) // 2] for size in found]


def _size(tensor: Tensor) -> float:
    kept = int(tensor.count_nonzero())
    return float(tensor.float().square().sum() / kept) ** 0.5 if kept else 0.0
