"""Perplexity of a causal language model on consecutive windows of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import ModelError


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over all tokens predicted."""

    perplexity: float
    nats_per_token: float
    tokens: int
    windows: int
    seq_len: int


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 1, progress: bool | None = None) -> Perplexity:
    """Perplexity on windows (windows, tokens): each is read on its own, and all but its first token are predicted.

    Logits are taken to float32. Memory: the logits of one batch, twice.

    Raises:
        ModelError: the model predicts masked tokens, or gives no logits over its vocabulary.
    """
    if type(model).__name__.endswith("ForMaskedLM"):
        raise ModelError(
            f"{type(model).__name__} predicts masked tokens, not next ones; perplexity needs a causal model"
        )
    device = next(model.parameters()).device
    total = 0.0
    batches = windows.split(batch_size)
    bar = tqdm(batches, desc="Evaluating", unit="batch", disable=None if progress is None else not progress)
    for batch in bar:
        ids = batch.to(device)
        logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
        if logits is None or logits.shape[:2] != ids.shape:
            raise ModelError(f"{type(model).__name__} gives no logits for every token; perplexity needs a causal model")
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total += float(loss)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / tokens
    return Perplexity(math.exp(min(mean, 700.0)), mean, tokens, windows.shape[0], windows.shape[1])
