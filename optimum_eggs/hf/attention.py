"""An attention that transformers knows by the name of `eggs`: as fast as the packed layers, one new token at a time.

It is asked for by name, as others are: `from_pretrained(..., attn_implementation="eggs")`, or
`model.set_attn_implementation("eggs")`. With more than one new token, with derivatives and on other devices it is
`sdpa`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..ops.attend import attend
from ..ops.watch import needs_no_derivatives

NAME = "eggs"


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
    """What transformers calls: (batch, heads, queries, dim) to (batch, queries, heads, dim), and no weights."""
    ours = (
        query.shape[2] == 1
        and needs_no_derivatives(query)
        and not dropout
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
    )
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
