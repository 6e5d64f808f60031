"""Streaming statistics of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import Ranks

STRIP = 256  # columns: of wide matrices 0.55 of the time of the whole product, of 576 columns 0.73


class GramAccumulator:
    """Sums XXᵀ over batches: `gram` (in, in), float32, and `tokens`.

    On a CPU the entries below the diagonal are summed, in strips of columns, and copied above when they are asked for.

    >>> statistics = GramAccumulator(2, torch.device("cpu"))
    >>> statistics.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> statistics.gram
    tensor([[10., 14.],
            [14., 20.]])
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        # float32: a bfloat16 running sum of ones sticks at 256
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._lower_alone = False
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs (..., in)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._sum.device)
        if multiplies_halves(rows.device, rows.dtype):
            self._sum += torch.mm(rows.t(), rows, out_dtype=torch.float32)
        elif rows.device.type != "cpu":
            rows = rows.to(torch.float32)
            self._sum.addmm_(rows.t(), rows)
        else:
            rows = rows.to(torch.float32)
            for start in range(0, len(self._sum), STRIP):
                strip = self._sum[start:, start : start + STRIP]
                strip.addmm_(rows[:, start:].t(), rows[:, start : start + STRIP])
            self._lower_alone = True
        self.tokens += len(rows)

    @property
    def gram(self) -> Tensor:
        """XXᵀ (in, in), the sum itself and no copy."""
        if self._lower_alone:
            for start in range(0, len(self._sum), STRIP):
                stop = start + STRIP
                self._sum[start:stop, stop:] = self._sum[stop:, start:stop].t()
            self._lower_alone = False
        return self._sum

    def over_all(self, ranks: Ranks) -> GramAccumulator:
        """Sum the statistics of all processes."""
        count = torch.tensor(self.tokens)
        ranks.add(self.gram, count)
        self.tokens = int(count)
        return self

    def forget_inputs(self) -> None:
        """Leave the weights alone to go by: as if the inputs were independent and of one size."""
        self._sum = torch.eye(len(self._sum), device=self._sum.device)
        self._lower_alone = False

    @property
    def input_norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens (in,)."""
        return self.gram.diagonal().sqrt()

    def is_finite(self) -> bool:
        """Whether every input seen was finite."""
        return bool(torch.isfinite(self._sum.diagonal()).all())


def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a product of matrices of `dtype` that is exact in its terms, and sums them in float32.

    It spares the float32 copy of what is multiplied, and is twice as fast as TF32 would be, which is exact there too:
    the product of two bfloat16 numbers has 16 bits, of two float16 numbers 22, and float32 has 24. torch has it for
    CUDA; for ROCm not in all versions that this package works with.
    """
    return device.type == "cuda" and torch.version.hip is None and dtype in (torch.bfloat16, torch.float16)
