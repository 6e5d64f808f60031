"""`MatrixNorm`: an RMS norm whose gain is a matrix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import ModelError

_ROWS = 4096  # of a vocabulary, that are in float64 at a time


class MatrixNorm(nn.Module):
    """x to M x/rms(x), rms(x) = √(mean(x²) + eps): what is left of a norm's gain in a rotated residual stream.

    In the basis of the rotation R, the gains Γ = diag(γ) of the norm before a head are M = RᵀΓR. A head with a weight
    of its own takes them in; one that shares that of the embeddings cannot.

    Args:
        size: d, of the hidden states.
        eps: As of the norm it replaces.
        device, dtype: Of the weight.

    Attributes:
        weight: M (d, d).
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self._plain: tuple[nn.Module, ...] = ()  # no part of this module
        self.weight = nn.Parameter(torch.empty(size, size, device=device, dtype=dtype))

    @classmethod
    def in_place_of(cls, norm: nn.Module) -> MatrixNorm:
        """An empty one of the size, dtype and device of an RMS norm.

        Raises:
            ModelError: it is none, or has more than gains.
        """
        eps = rms_eps(norm)
        if eps is None:
            raise ModelError(f"{type(norm).__name__} is no RMS norm with gains alone")
        gains = norm.get_parameter("weight")
        made = cls(len(gains), eps, device=gains.device, dtype=gains.dtype).train(norm.training)
        made._plain = (copy.deepcopy(norm).to("meta"),)
        return made

    def to_plain(self) -> nn.Module:
        """The norm that it was made in place of, with gains of one."""
        (norm,) = self._plain
        plain = copy.deepcopy(norm)
        plain.weight = nn.Parameter(torch.ones(len(self.weight), device=self.weight.device, dtype=self.weight.dtype))
        return plain.train(self.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., d) to (..., d), normalised in float32."""
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return nn.functional.linear(normed.to(hidden_states.dtype), self.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.weight)}, eps={self.eps}"


def times(weight: Tensor, matrix: Tensor) -> Tensor:
    """A weight (rows, d) times a matrix (d, d), in the dtype of the matrix, some rows at a time; rounded to its own."""
    return torch.cat([(rows.to(matrix) @ matrix).to(weight.dtype) for rows in weight.split(_ROWS)])


def rms_eps(norm: nn.Module) -> float | None:
    """The eps of an RMS norm that has nothing but gains (d,), told by its name; None for any other module."""
    own = dict(norm.named_parameters())
    if not type(norm).__name__.endswith("RMSNorm") or list(own) != ["weight"] or own["weight"].dim() != 1:
        return None
    found = next((getattr(norm, key) for key in ("variance_epsilon", "eps") if hasattr(norm, key)), None)
    return None if found is None else float(found)
