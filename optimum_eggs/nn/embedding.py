"""`CodedEmbedding`: an embedding that holds its vectors as integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..ops.coded_linear import values_of
from ..packing.codes import Coding, store_codes
from .coded import INT8, CodedLinear, keep_scale


class CodedEmbedding(nn.Embedding):
    """Looks up vectors whose values are codes times scales.

    What it gives is of the dtype that it was made in, or that the model was cast to since. Its integers have no
    gradient.

    Args:
        num_embeddings: As for `nn.Embedding`.
        embedding_dim: Likewise.
        padding_idx: Likewise.
        coding: Of the values.
        device: As for `nn.Embedding`.
        dtype: Of what it gives.

    Attributes:
        weight: The codes (num_embeddings, embedding_dim), int8, a parameter without gradient.
        weight_scale: (num_embeddings, ⌈embedding_dim/group⌉), bfloat16, a buffer.
    """

    weight_scale: Tensor
    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        coding: Coding = INT8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.coding = coding
        codes = torch.empty(num_embeddings, coding.width(embedding_dim), device=device, dtype=coding.dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(num_embeddings, coding.scales(embedding_dim), device=device, dtype=torch.bfloat16)
        self.register_buffer("weight_scale", scale)
        # A cast of the model finds no other tensor here.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def reset_parameters(self) -> None:
        """Do nothing: there is nothing to begin a training with."""

    @classmethod
    @torch.no_grad()
    def from_codes(cls, dense: nn.Embedding, codes: Tensor, scale: Tensor, coding: Coding) -> CodedEmbedding:
        """Take the place of a dense embedding.

        Args:
            dense: The embedding.
            codes: (num_embeddings, embedding_dim), int8.
            scale: (num_embeddings, ⌈embedding_dim/group⌉).
            coding: Of the codes.

        Raises:
            ShapeError: codes or scales do not fit.
        """
        made = cls(
            dense.num_embeddings,
            dense.embedding_dim,
            dense.padding_idx,
            coding,
            device="meta",
            dtype=dense.weight.dtype,
        )
        if codes.shape != dense.weight.shape or scale.shape != made.weight_scale.shape:
            raise ShapeError(
                f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not fit the embedding; they must be "
                f"{tuple(dense.weight.shape)} and {tuple(made.weight_scale.shape)}"
            )
        made.weight = nn.Parameter(store_codes(codes, coding), requires_grad=False)
        made.weight_scale = scale.to(torch.bfloat16)
        made.like = torch.empty(0, dtype=dense.weight.dtype, device=codes.device)
        return made.train(dense.training)

    def dense_weight(self) -> Tensor:
        """The vectors (num_embeddings, embedding_dim), float32."""
        return self._values(self.weight, self.weight_scale, torch.float32)

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The dense embedding, in the dtype that this one gives."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        values = self._values(self.weight, self.weight_scale, self.like.dtype)
        dense.weight = nn.Parameter(values)
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...) to vectors (..., embedding_dim)."""
        ids = input.flatten()
        codes, scale = (nn.functional.embedding(ids, part) for part in (self.weight, self.weight_scale))
        return self._values(codes, scale, self.like.dtype).view(*input.shape, self.embedding_dim)

    def _values(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return values_of(codes, scale, self.embedding_dim, 1, 1, self.coding.kind, self.coding.group, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with keep_scale(self):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, values={self.coding.kind}, group={self.coding.group}"


class TiedCodedLinear(CodedLinear):
    """An output head that shares the codes and scales of coded input embeddings, which alone are stored."""

    def __init__(self, head: nn.Linear, embedding: CodedEmbedding) -> None:
        super().__init__(
            head.in_features, head.out_features, head.bias is not None, None, embedding.coding, device="meta"
        )
        self._embedding = (embedding,)  # no part of this module
        self.weight, self.bias = embedding.weight, head.bias
        del self.weight_scale
        self.register_buffer("weight_scale", embedding.weight_scale, persistent=False)
        self.train(head.training)

    @property
    def embedding(self) -> CodedEmbedding:
        """Whose weight it shares."""
        return self._embedding[0]

    def _scale(self) -> Tensor:
        shared, own = self._embedding[0].weight_scale, self.weight_scale
        if shared is not own and shared.device == self.weight.device:  # as when it was loaded or moved alone
            self.weight_scale = own = shared
        return own
