"""Perplexity of a causal language model on windows of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from .reading import Reading, read


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over all tokens predicted.

    `bits_per_byte` is the same likelihood over the bytes that those tokens stand for, which models of different
    vocabularies can be compared by; None where the bytes are not known.
    """

    perplexity: float
    nats_per_token: float
    tokens: int
    windows: int
    seq_len: int
    bits_per_byte: float | None = None


def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 1, context: int = 0, progress: bool | None = None
) -> Perplexity:
    """Perplexity on windows (windows, tokens); arguments, memory and errors as of [`read`]."""
    return perplexity_of(read([model], windows, batch_size, context, progress), 0, windows)


def perplexity_of(reading: Reading, model: int, windows: Tensor, text_bytes: int | None = None) -> Perplexity:
    """Perplexity of one of the models of a reading. `text_bytes`: the bytes of the tokens predicted, if known."""
    total, tokens = float(reading.nats[model].sum()), int(reading.tokens.sum())
    mean = total / tokens
    bits = total / math.log(2) / text_bytes if text_bytes else None
    return Perplexity(math.exp(min(mean, 700.0)), mean, tokens, windows.shape[0], windows.shape[1], bits)
