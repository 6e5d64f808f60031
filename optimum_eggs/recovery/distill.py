"""The teacher's most likely tokens, stored once, and how far a student is from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..errors import NumericalError
from ..evaluation.finite import first_not_finite

_CHUNK = 256  # tokens whose logits exist in float32 at a time


@dataclass(frozen=True)
class TeacherTokens:
    """For every token of every window the teacher's most likely next tokens.

    ids: (windows, tokens, k), int32. log_probs: the same shape, float16, natural logarithms.
    """

    ids: Tensor
    log_probs: Tensor


@torch.no_grad()
def teacher_tokens(
    teacher: nn.Module, windows: Tensor, top_k: int = 64, autocast: bool = False, progress: bool | None = None
) -> TeacherTokens:
    """Run the teacher over windows (windows, tokens), one by one, and keep its `top_k` most likely next tokens.

    `autocast`: multiply in bfloat16, as the student does while it is trained.

    Memory: 6 · top_k bytes a token, and the logits of one window, twice.

    Raises:
        NumericalError: its predictions are not finite.
    """
    device = next(teacher.parameters()).device
    ids, log_probs = [], []
    bar = tqdm(windows, desc="Reading the teacher", unit="window", disable=None if progress is None else not progress)
    for window in bar:
        run = partial(teacher, input_ids=window[None].to(device), use_cache=False)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = run().logits[0].float()
            total = logits.logsumexp(-1, keepdim=True)
            if not bool(torch.isfinite(total).all()):
                layer = first_not_finite(teacher, run)
                raise NumericalError(
                    f"the teacher's predictions are NaN or infinite, and the first such output is that of {layer}; "
                    "look for such values in its weights"
                )
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        ids.append(best.indices.to("cpu", torch.int32))
        log_probs.append((best.values - total).to("cpu", torch.float16))
    return TeacherTokens(torch.stack(ids), torch.stack(log_probs))


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher to the student, in nats a token.

    All that the teacher gives to tokens beyond its most likely ones counts as one token more, so that the value is a
    divergence of two distributions, a lower bound of that over the whole vocabulary.

    Args:
        logits: The student's (tokens, vocabulary), any dtype; taken to float32 a chunk at a time, and again in the
            backward pass.
        ids: The teacher's most likely tokens (tokens, k).
        log_probs: Their log-probabilities (tokens, k).

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> divergence(logits, torch.tensor([[0, 1]]), logits.log_softmax(-1)[:, :2]).abs().item() < 1e-6
    True
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for part in zip(logits.split(_CHUNK), ids.split(_CHUNK), log_probs.split(_CHUNK), strict=True):
        total = total + checkpoint(_divergence, *part, use_reentrant=False)
    return total / len(logits)


def _divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    logits, log_probs = logits.float(), log_probs.float()
    student = logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)
    share = log_probs.exp()
    tiny = 1e-6
    rest, students_rest = ((1 - p.sum(-1)).clamp_min(tiny) for p in (share, student.exp()))
    return ((share * (log_probs - student)).sum(-1) + rest * (rest.log() - students_rest.log())).sum()


def block_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of ‖S − T‖²/‖T‖², S and T what student and teacher put out, (..., hidden); in float32.

    >>> block_error([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0, 5.0]])])
    tensor(0.4000)
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        errors.append((ours.float() - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12))
    return torch.stack(errors).mean()


class TeacherWindows(torch.utils.data.Dataset):
    """Windows (windows, tokens), with the teacher's tokens if there is a teacher."""

    def __init__(self, windows: Tensor, teacher: TeacherTokens | None) -> None:
        self.windows, self.teacher = windows, teacher

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"input_ids": self.windows[index], "labels": self.windows[index]}
        if self.teacher is not None:
            item |= {"teacher_ids": self.teacher.ids[index], "teacher_log_probs": self.teacher.log_probs[index]}
        return item
