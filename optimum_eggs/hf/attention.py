"""An attention that transformers knows by the name of `eggs`: as fast as the packed layers, one new token at a time.

It is asked for by name, as others are: `from_pretrained(..., attn_implementation="eggs")`, or
`model.set_attn_implementation("eggs")`. With more than one new token, with derivatives and on other devices it is
`sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import ModelError
from ..ops import native
from ..ops.attend import attend
from ..ops.watch import compiles_without_derivatives, nothing_watches

NAME = "eggs"
KNOWN = frozenset(
    [
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)
"""Types of models for which it is right. Others may ask whether their attention is `sdpa`, and do otherwise if not."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: (batch, heads, queries, dim) to (batch, queries, heads, dim), and no weights.

    Raises:
        ModelError: the model is of a type that is not known to be right with it.
    """
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise ModelError(
            f"attn_implementation='{NAME}' is not known to be right for models of the type {kind!r}, only for "
            f"{', '.join(sorted(KNOWN))}; use 'sdpa'"
        )
    if query.shape[2] != 1 or dropout or not _ours(query, key, value, attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale), None


def _ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes these, and nothing watches."""
    if not native.registered() or query.device.type != "cpu":
        return False
    compiling = torch.compiler.is_compiling()
    if not (compiles_without_derivatives() if compiling else nothing_watches(query, key, value)):
        return False
    fits = query.dtype is key.dtype and query.dtype in (torch.float32, torch.bfloat16)
    fits = fits and query.shape[-1] % 16 == 0 and query.shape[-1] <= native.MOST_DIM
    return fits and (mask is None or mask.dtype is torch.bool)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
