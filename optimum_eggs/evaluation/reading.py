"""One or two causal models reading the same windows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import ModelError, NumericalError
from .finite import first_not_finite


@dataclass(frozen=True)
class Reading:
    """Sums over the tokens predicted in each window, float64.

    Attributes:
        nats: Negative log-likelihood of each model (models, windows).
        tokens: Tokens predicted (windows,).
        divergence: Of two models, the Kullback-Leibler divergence from the second to the first, KL(second ‖ first),
            over the whole vocabulary (windows,); None of one model.
        agreement: Of two models, tokens of which both call the same next one the most likely (windows,).
    """

    nats: Tensor
    tokens: Tensor
    divergence: Tensor | None = None
    agreement: Tensor | None = None


@torch.no_grad()
def read(
    models: Sequence[nn.Module],
    windows: Tensor,
    batch_size: int = 1,
    context: int = 0,
    progress: bool | None = None,
) -> Reading:
    """Let each model predict every window (windows, tokens) on its own.

    All tokens but the first are predicted. With `context`, windows after the first count only what follows their first
    `context` tokens, for windows that overlap by that many. Logits are taken to float32. Memory: the logits of one
    batch, twice; of two models, five times.

    Raises:
        ModelError: a model predicts masked tokens, gives no logits over a vocabulary, or not over the same one.
        NumericalError: a loss, or a divergence, is not finite; it names the first layer whose output is not.
    """
    for model in models:
        if type(model).__name__.endswith("ForMaskedLM"):
            raise ModelError(
                f"{type(model).__name__} predicts masked tokens, not next ones; perplexity needs a causal model"
            )
    nats: list[Tensor] = []
    tokens, divergence, agreement = [], [], []
    positions = torch.arange(1, windows.shape[1])
    batches = windows.split(batch_size)
    bar = tqdm(batches, desc="Evaluating", unit="batch", disable=None if progress is None else not progress)
    for index, batch in enumerate(bar):
        counted = (positions >= context).repeat(len(batch), 1)
        if index == 0:
            counted[0] = True
        logits = [_logits(model, batch) for model in models]
        if len({each.shape[-1] for each in logits}) > 1:
            sizes = " and ".join(str(each.shape[-1]) for each in logits)
            raise ModelError(f"the models have vocabularies of {sizes}, so their predictions cannot be compared")
        losses = [_losses(each, batch[:, 1:]) for each in logits]
        for model, loss in zip(models, losses, strict=True):
            _check_finite(model, batch, index * batch_size, loss, "loss")
        nats.append(torch.stack([(loss * counted).sum(1) for loss in losses]))
        tokens.append(counted.sum(1))
        if len(logits) == 2:
            ours, theirs = logits[0], logits[1].to(logits[0].device)
            agrees = (ours.argmax(-1) == theirs.argmax(-1)).cpu()
            agreement.append((agrees & counted).sum(1).double())
            kl = _divergence(ours.log_softmax(-1), theirs.log_softmax(-1))
            _check_finite(models[0], batch, index * batch_size, kl, "divergence from the other model")
            divergence.append((kl.cpu().double() * counted).sum(1))
    return Reading(
        torch.cat(nats, 1),
        torch.cat(tokens),
        torch.cat(divergence) if divergence else None,
        torch.cat(agreement) if agreement else None,
    )


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of log-probabilities (batch, tokens, vocabulary), summed over the vocabulary.

    What has no chance in the second adds nothing, also where it has none in the first, as in slots that both mask.
    """
    terms = F.kl_div(ours, theirs, log_target=True, reduction="none")
    return terms.masked_fill_(theirs.isneginf(), 0.0).sum(-1)


def _check_finite(model: nn.Module, batch: Tensor, first: int, values: Tensor, what: str) -> None:
    """Raise unless the values (batch, tokens - 1) are finite; the batch begins with window `first`."""
    wrong = torch.isfinite(values).logical_not().nonzero()
    if not len(wrong):
        return
    row, token = wrong[0].tolist()
    layer = first_not_finite(model, lambda: _logits(model, batch[row : row + 1]))
    where = "the outputs of its layers are finite" if layer is None else f"the first such output is that of {layer}"
    raise NumericalError(
        f"{getattr(model, 'name_or_path', '') or type(model).__name__}: the {what} is NaN or infinite at token "
        f"{token + 1} of window {first + row}, and {where}; look for such values in the weights, or run in a wider "
        "dtype"
    )


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target (batch, tokens), float64, on the CPU."""
    flat = targets.flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), flat, reduction="none").view(targets.shape).double().cpu()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits (batch, tokens - 1, vocabulary) of all tokens but the last."""
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:  # it would read what it is to predict
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; perplexity needs a causal model")
    ids = ids.to(next(model.parameters()).device)
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise ModelError(f"{type(model).__name__} gives no logits for every token; perplexity needs a causal model")
    return logits[:, :-1].float()
