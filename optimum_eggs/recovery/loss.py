"""The loss of distillation, with its gradient, a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NUMBERS = {"cpu": 1 << 20}  # logits in float32 at a time: what a processor's cache holds
_OTHERWISE = 1 << 25
_TINY = 1e-6  # the least probability of all other tokens together


def distillation_loss(
    logits: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, kd_ratio: float = 1.0
) -> Tensor:
    """`kd_ratio` of the mean divergence from the teacher, and the rest of the mean loss on the text; nats a token.

    The divergence is Kullback and Leibler's, from the teacher to the student. All that the teacher gives to tokens
    beyond its most likely ones counts as one token more, so that it is of two distributions, and a lower bound of that
    over the whole vocabulary. Mixed as by Hinton, Vinyals and Dean (arXiv 1503.02531), at a temperature of 1.

    The gradient is worked out in the forward pass: logits are looked at once, and beside them exists one tensor of
    their size and dtype, and a few tokens' in float32.

    Args:
        logits: The student's (tokens, vocabulary).
        ids: The teacher's most likely tokens (tokens, k).
        log_probs: Their log-probabilities (tokens, k).
        labels: The tokens that follow (tokens,), negative where there is none; not looked at if `kd_ratio` is 1.
        kd_ratio: Between 0 and 1.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> taught = logits.log_softmax(-1)[:, :2]
    >>> distillation_loss(logits, torch.tensor([[0, 1]]), taught).abs().item() < 1e-6
    True
    >>> distillation_loss(logits, torch.tensor([[0, 1]]), taught, torch.tensor([2]), 0.5)
    tensor(1.2038)
    """
    return _DistillationLoss.apply(logits, ids, log_probs, None if kd_ratio == 1 else labels, kd_ratio)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, kd_ratio: float
    ) -> Tensor:
        of_teacher = torch.tensor(kd_ratio / len(logits), device=logits.device)
        of_text = None if labels is None else (1 - kd_ratio) / (labels >= 0).sum().clamp_min(1)
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        height = max(1, _NUMBERS.get(logits.device.type, _OTHERWISE) // logits.shape[1])
        for start in range(0, len(logits), height):
            rows = slice(start, start + height)
            own = None if labels is None else labels[rows]
            part = logits[rows].to(total.dtype, copy=True)
            value, part = _some_tokens(part, ids[rows].long(), log_probs[rows].to(part.dtype), own, of_teacher, of_text)
            total += value
            if slope is not None:
                slope[rows] = part
        if slope is not None:
            ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad), None, None, None, None


def _some_tokens(
    logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    of_teacher: Tensor,
    of_text: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What some tokens add to the loss, and its derivative by their logits, which is put in their place."""
    highest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, ids)
    right = None if labels is None else logits.gather(-1, labels.clamp(min=0)[:, None])
    weights = logits.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    log_total = total.log().add_(highest)

    student = chosen - log_total
    share, given = log_probs.exp(), student.exp()
    rest, left = 1 - share.sum(-1, keepdim=True), 1 - given.sum(-1, keepdim=True)
    there, rest, left = left >= _TINY, rest.clamp_min(_TINY), left.clamp_min(_TINY)
    value = of_teacher * ((share * (log_probs - student)).sum() + (rest * (rest.log() - left.log())).sum())
    by_student = (there * rest / left * given - share).mul_(of_teacher)  # the derivative by its log-probabilities
    of_all = by_student.sum(-1, keepdim=True).neg_()
    if labels is None or right is None or of_text is None:
        return value, weights.mul_(of_all / total).scatter_add_(-1, ids, by_student)
    counted = ((labels >= 0)[:, None] * of_text).to(weights.dtype)
    value += (counted * (log_total - right)).sum()
    weights.mul_((of_all + counted) / total).scatter_add_(-1, ids, by_student)
    return value, weights.scatter_add_(-1, labels.clamp(min=0)[:, None], -counted)
