"""Block tuning: the weights that a block keeps, moved together so that its output comes near the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..errors import CalibrationError, ModelError
from ..nn.dense import is_conv1d, is_dense_linear
from ..ranks import Ranks
from .error import token_error
from .precision import bfloat16_products, in_float32
from .rates import sizes
from .rounding import RoundedLayer, rounding_in_the_loop

HELD_OUT, MOST_HELD_OUT = 1 / 8, 8
"""Share of the calibration batches that a block is not tuned on, but judged by; and the most of them."""

_WARM_UP = 4  # steps over which the learning rate rises
_JUDGED = 6  # times that the windows held out are judged while a block is tuned


@dataclass(frozen=True)
class BlockTuning:
    """How tuning a block went. Errors are `token_error` on the held-out windows.

    Attributes:
        block: Index of the block.
        error_before, error_after: Before the first step, and of the weights that were kept.
        steps: Adam steps done.
        best_step: The step whose weights were kept; 0 if none was better than not tuning.
    """

    block: int
    error_before: float
    error_after: float
    steps: int
    best_step: int


def check_tunable(batches: int, batch_size: int) -> None:
    """Raise unless there are gradients, something to tune on, and something to judge by.

    Raises:
        CalibrationError: there is only one batch.
        ModelError: gradients cannot be had, as under `torch.inference_mode()`.
    """
    if batches < 2:
        raise CalibrationError(
            f"block_tuning holds out a part of the calibration windows, and batch_size={batch_size} leaves only one "
            "batch; use a smaller batch_size or more windows"
        )
    if torch.is_inference_mode_enabled():
        raise ModelError("block_tuning needs gradients, and torch.inference_mode() forbids them; use torch.no_grad()")


def tune_block(
    walk: Walk,
    block: nn.Module,
    index: int,
    masks: Mapping[nn.Module, Tensor],
    targets: Sequence[Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    rounded: Mapping[nn.Module, RoundedLayer] | None = None,
) -> BlockTuning:
    """Tune block `index` in place: pruned weights where the mask keeps them, biases and norms.

    Adam on [`token_error`] with a warm-up of four steps and a cosine decay, each step on one batch of the walk's hidden
    states; no batch comes again before all others have. Six times the held-out ones are judged, and the best weights
    seen are kept; if none was better than those it began with, the block stays as it was.

    Weights are in float32, and so is all that is judged. During a step the linear layers multiply in bfloat16, where
    the device has instructions for that.

    The rate of every tensor is relative to its size.

    Memory: five float32 copies of the block (weights, gradients, two moments, best weights), half of one for weights in
    bfloat16, and one batch's activations.

    Args:
        walk: Where the hidden states before the block come from.
        block: The block, dense weights with zeros in place.
        index: Its index.
        masks: Pruned layer -> mask (out, in).
        targets: What the block should give, batch by batch.
        steps: Adam steps.
        learning_rate: The largest, as a share of the root mean square of a tensor's kept entries.
        seed: Seed of the order of the batches.
        rounded: Pruned layers whose values are to be codes times scales: they are throughout, and their scales are
            tuned too.

    Returns:
        The errors before and after.
    """
    held = min(MOST_HELD_OUT, max(1, round(len(targets) * HELD_OUT)))
    training, judging = range(len(targets) - held), range(len(targets) - held, len(targets))
    # every block its own order
    generator = torch.Generator().manual_seed((seed * 10_007 + index) % 2**63)

    def error(batch: int) -> Tensor:
        output = walk.run(block, index, batch, dtype=torch.float32)
        return token_error(output, targets[batch].to(output))

    def held_out_error() -> float:
        with torch.no_grad():
            total = torch.tensor(sum(float(error(batch)) for batch in judging), dtype=torch.float64)
        with walk.exchange():
            walk.ranks.add(total)
        return float(total) / len(judging) / walk.ranks.size

    with _trainable(block, masks) as (parameters, kept), rounding_in_the_loop(rounded or {}) as scales:
        parameters, kept = [*parameters, *scales], [*kept, *[None] * len(scales)]
        of_size = sizes(parameters)
        before = best = held_out_error()
        best_step, best_values = 0, [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.Adam([{"params": [p]} for p in parameters], fused=True)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(training), generator=generator).tolist()
            rate = learning_rate * min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, size in zip(optimizer.param_groups, of_size, strict=True):
                group["lr"] = rate * size
            with torch.enable_grad(), bfloat16_products(block):
                own = torch.autograd.grad(error(order.pop()), parameters, allow_unused=True)
            with walk.exchange():
                gradients = _mean_over(walk.ranks, own, parameters)
            for parameter, gradient, mask in zip(parameters, gradients, kept, strict=True):
                if gradient is not None and gradient.stride() != parameter.stride():  # fused Adam goes by memory
                    gradient = torch.empty_like(parameter).copy_(gradient)
                # Adam leaves alone what never had a gradient, so what is pruned stays zero.
                parameter.grad = gradient if gradient is None or mask is None else gradient.mul_(mask)
            optimizer.step()
            if (step + 1) * _JUDGED // steps == step * _JUDGED // steps:
                continue
            now = held_out_error()
            if now < best:
                best, best_step = now, step + 1
                for value, parameter in zip(best_values, parameters, strict=True):
                    value.copy_(parameter.data)
        for parameter, value in zip(parameters, best_values, strict=True):
            parameter.data.copy_(value)
            walk.ranks.copy_from(0, parameter.data)  # processors of several kinds round otherwise
    return BlockTuning(index, before, best, steps, best_step)


def _mean_over(
    ranks: Ranks, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of the whole batch, from those of every process's part of it."""
    if ranks.size == 1:
        return gradients
    used = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.float32)
    ranks.add(used)  # as an expert, that only some parts of the batch reach
    found: list[Tensor | None] = []
    for gradient, parameter, count in zip(gradients, parameters, used.tolist(), strict=True):
        mean = None
        if count:
            mean = torch.zeros_like(parameter) if gradient is None else gradient
            ranks.add(mean)
            mean /= ranks.size
        found.append(mean)
    return found


@contextmanager
def _trainable(
    block: nn.Module, masks: Mapping[nn.Module, Tensor]
) -> Iterator[tuple[list[nn.Parameter], list[Tensor | None]]]:
    """The parameters to tune with their masks, while the block is in float32 and nothing else in it asks for gradients.

    They are the weights of pruned layers, and everything one-dimensional but the biases of linear layers left dense.
    """
    shaped: dict[int, Tensor] = {}
    left_alone: set[int] = set()
    for module in filter(is_dense_linear, block.modules()):
        if module in masks:
            mask = masks[module].t() if is_conv1d(module) else masks[module]
            shaped[id(module.weight)] = mask.to(module.get_parameter("weight").device)
        else:
            left_alone |= {id(parameter) for parameter in module.parameters()}
    asked = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    chosen = [
        parameter
        for parameter in block.parameters()
        if id(parameter) in shaped
        or (parameter.dim() == 1 and parameter.is_floating_point() and id(parameter) not in left_alone)
    ]
    with in_float32(block):
        try:
            for parameter, _ in asked:
                parameter.requires_grad_(False)
            for parameter in chosen:
                parameter.requires_grad_(True)
            yield chosen, [shaped.get(id(parameter)) for parameter in chosen]
        finally:
            for parameter, requires_grad in asked:
                parameter.grad = None
                parameter.requires_grad_(requires_grad)
