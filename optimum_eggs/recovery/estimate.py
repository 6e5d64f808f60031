"""How long a recovery will take, told before it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..engine.estimate import duration, where_and_how
from ..nn import packed_layers

if TYPE_CHECKING:
    from .recover import RecoverySettings

_STEP = {torch.float32: 4.1, torch.bfloat16: 2.5}
"""A window in a step that multiplies in this dtype, over a forward pass of it in float32 without gradients: so windows
are judged. Timed on two cores, without instructions for bfloat16 and with them."""


def passes(
    settings: RecoverySettings, windows: int, held_out: int, dtype: torch.dtype, done: int = 0, taught: bool = False
) -> float:
    """Forward passes of a window that are still to come in a process.

    The teacher reads each window once; those held out, if any, are judged at every evaluation and at the end. With
    `block_matching` the teacher runs beside the model, but for the last judgement. In a step a window takes one pass
    more where activations are computed again.

    Args:
        settings: How the model is trained.
        windows: All of them, those held out included.
        held_out: Windows held out.
        dtype: What training multiplies in.
        done: Steps that an interrupted run did.
        taught: Whether it read the teacher.
    """
    beside = bool(settings.block_matching)
    of_step = _STEP[dtype] + settings.gradient_checkpointing + beside
    evaluations = math.ceil(settings.steps / settings.eval_steps) - done // settings.eval_steps  # and at the last step
    reads = 0 if settings.teacher is None or taught else windows
    judged = (evaluations * (1 + beside) + 1) * held_out
    return reads + judged + (settings.steps - done) * settings.batch_size * of_step


def announcement(
    model: nn.Module, settings: RecoverySettings, dtype: torch.dtype, processes: int, done: int, seconds: float
) -> str:
    """What is about to be done, how long it will take, and how to make it shorter."""
    device = next(model.parameters()).device
    what = "the packed values of" if settings.method == "values" else f"a LoRA of rank {settings.rank} on"
    batch = f"{settings.batch_size} x {settings.seq_len} tokens"
    each = f" in each of {processes} processes" if processes > 1 else ""
    before = f", {done} of them done" if done else ""
    goal = "" if settings.teacher is None else ", towards the teacher"
    return (
        f"{type(model).__name__} {where_and_how(device, dtype)}: {what} {len(packed_layers(model))} layers, "
        f"{settings.steps} steps of {batch}{each}{before}{goal}\n"
        f"about {duration(seconds)}; fewer steps or smaller batches (steps, batch_size) take less, and what is "
        "interrupted goes on from its last checkpoint"
    )
