"""The teacher's most likely tokens, stored once, and how far the output of its blocks is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import NumericalError
from ..evaluation.finite import first_not_finite


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
