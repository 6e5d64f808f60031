"""Streaming statistics of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import Ranks


class GramAccumulator:
    """Sums XXᵀ over batches: `gram` (in, in), float32, and `tokens`.

    Attributes:
        cross: YXᵀ (in, in), float32, if each batch came with other inputs Y of the same tokens; else None.

    >>> statistics = GramAccumulator(2, torch.device("cpu"))
    >>> statistics.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> statistics.gram
    tensor([[10., 14.],
            [14., 20.]])
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        # float32: a bfloat16 running sum of ones sticks at 256
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.cross: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor, others: Tensor | None = None) -> None:
        """Add a batch of inputs (..., in), and other inputs of the same tokens."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.gram)
        self.gram.addmm_(rows.t(), rows)
        self.tokens += len(rows)
        if others is not None:
            self.cross = torch.zeros_like(self.gram) if self.cross is None else self.cross
            self.cross.addmm_(others.detach().reshape(rows.shape).to(rows).t(), rows)

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

    def forget_inputs(self) -> None:
        """Leave the weights alone to go by: as if the inputs were independent and of one size."""
        self.gram = torch.eye(len(self.gram), device=self.gram.device)
        self.cross = None

    @property
    def input_norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens (in,)."""
        return self.gram.diagonal().sqrt()

    def is_finite(self) -> bool:
        """Whether every input seen was finite."""
        finite = bool(torch.isfinite(self.gram.diagonal()).all())
        return finite and (self.cross is None or bool(torch.isfinite(self.cross).all()))
