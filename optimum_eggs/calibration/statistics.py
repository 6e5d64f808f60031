"""Streaming statistics of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import Ranks

STRIP = 256  # columns: of wide matrices 0.55 of the time of the whole product, of 576 columns 0.73


class GramAccumulator:
    """Sums XXᵀ over batches: `gram` (in, in), float32, and `tokens`.

    Attributes:
        cross: YXᵀ (in, in), float32, if each batch came with other inputs Y of the same tokens; else None.

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
        self.cross: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor, others: Tensor | None = None) -> None:
        """Add a batch of inputs (..., in), and other inputs of the same tokens."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._sum.device)
        if others is not None:
            self._add_products(others.detach().reshape(rows.shape).to(rows), rows)
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

    def _add_products(self, others: Tensor, rows: Tensor) -> None:
        """Add to `cross`; both (tokens, in)."""
        if self.cross is None:
            self.cross = torch.zeros_like(self._sum)
        if multiplies_halves(rows.device, rows.dtype):
            self.cross += torch.mm(others.t(), rows, out_dtype=torch.float32)
        else:
            self.cross.addmm_(others.t().to(torch.float32), rows.to(torch.float32))

    @property
    def gram(self) -> Tensor:
        """XXᵀ (in, in), the sum itself and no copy."""
        if self._lower_alone:
            for start in range(0, len(self._sum), STRIP):
                stop = start + STRIP
                self._sum[start:stop, stop:] = self._sum[stop:, start:stop].t()
            self._lower_alone = False
        return self._sum

    def over_all(self, ranks: Ranks, paired: bool = False) -> GramAccumulator:
        """Sum the statistics of all processes. `paired`: whether this one has all of its products with others."""
        counts = torch.tensor([self.tokens, int(paired)])
        ranks.add(self.gram, counts)
        self.tokens = int(counts[0])
        if int(counts[1]) < ranks.size:
            self.cross = None
        elif self.cross is not None:
            ranks.add(self.cross)
        return self

    def take_drift(self) -> Tensor | None:
        """(Y − X)Xᵀ (in, in), of the other inputs Y, or None if there were none.

        It takes the memory of `cross`, which is None from then on.
        """
        cross, self.cross = self.cross, None
        return None if cross is None else cross.sub_(self.gram)

    def forget_inputs(self) -> None:
        """Leave the weights alone to go by: as if the inputs were independent and of one size."""
        self._sum = torch.eye(len(self._sum), device=self._sum.device)
        self._lower_alone = False
        self.cross = None

    @property
    def input_norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens (in,)."""
        return self.gram.diagonal().sqrt()

    def is_finite(self) -> bool:
        """Whether every input seen was finite."""
        finite = bool(torch.isfinite(self._sum.diagonal()).all())
        # by its ends, since `isfinite` of all of it takes as much memory again
        return finite and (self.cross is None or bool(torch.isfinite(torch.stack(torch.aminmax(self.cross))).all()))


def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a product of matrices of `dtype` that is exact in its terms, and sums them in float32.

    It spares the float32 copy of what is multiplied, and is twice as fast as TF32 would be, which is exact there too:
    the product of two bfloat16 numbers has 16 bits, of two float16 numbers 22, and float32 has 24. torch has it for
    CUDA; for ROCm not in all versions that this package works with.
    """
    return device.type == "cuda" and torch.version.hip is None and dtype in (torch.bfloat16, torch.float16)
