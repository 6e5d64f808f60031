"""Block tuning: the weights that a block keeps, moved together so that its output comes near the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..errors import ModelError
from ..nn.dense import is_conv1d, is_dense_linear
from ..ranks import Ranks
from .error import token_error
from .precision import bfloat16_products, in_float32
from .rates import sizes
from .rounding import RoundedLayer, rounding_in_the_loop

_WARM_UP = 4  # steps over which the learning rate rises
_JUDGED = 16  # batches at the most


@dataclass(frozen=True)
class BlockTuning:
    """How tuning a block went. Errors are `token_error` on [`judged_batches`].

    Attributes:
        block: Index of the block.
        error_before, error_after: Before the first step, and of the weights that were kept.
        steps: Adam steps done.
        kept: Whether the weights of the last step are kept: not where they are no better than those from before.
    """

    block: int
    error_before: float
    error_after: float
    steps: int
    kept: bool


def judged_batches(batches: int) -> range:
    """The batches on which the error is taken before and after, 16 at the most.

    >>> list(judged_batches(3)), len(judged_batches(128))
    ([0, 1, 2], 16)
    """
    return range(0, batches, -(-batches // _JUDGED))


def check_tunable(what: str) -> None:
    """Raise if gradients, which `what` needs, cannot be had.

    Raises:
        ModelError: they cannot, as under `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(f"{what} needs gradients, and torch.inference_mode() forbids them; use torch.no_grad()")


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
    states; no batch comes again before all others have. If the error is no lower at the end, the block stays as it was.

    No batch is held out to stop by: the block was pruned by the statistics of all of them, so that one held out here
    would speak for the weights from before, whatever those tuned are worth on other text.

    Weights are in float32, and so is that error. During a step the linear layers multiply in bfloat16, where
    the device has instructions for that.

    The rate of every tensor is relative to its size.

    Memory: five float32 copies of the block (weights, gradients, two moments, weights before), half of one for weights
    in bfloat16, and one batch's activations.

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
    # every block its own order
    generator = torch.Generator().manual_seed((seed * 10_007 + index) % 2**63)

    def error(batch: int) -> Tensor:
        output = walk.run(block, index, batch, dtype=torch.float32)
        return token_error(output, targets[batch].to(output))

    judged = judged_batches(len(targets))

    def mean_error() -> float:
        with torch.no_grad():
            total = torch.tensor(sum(float(error(batch)) for batch in judged), dtype=torch.float64)
        with walk.exchange():
            walk.ranks.add(total)
        return float(total) / len(judged) / walk.ranks.size

    with _trainable(block, masks) as (parameters, entries), rounding_in_the_loop(rounded or {}) as scales:
        parameters, entries = [*parameters, *scales], [*entries, *[None] * len(scales)]
        of_size = sizes(parameters)
        before, values = mean_error(), [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.Adam([{"params": [p]} for p in parameters], fused=True)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(targets), generator=generator).tolist()
            rate = learning_rate * min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, size in zip(optimizer.param_groups, of_size, strict=True):
                group["lr"] = rate * size
            with torch.enable_grad(), bfloat16_products(block):
                own = torch.autograd.grad(error(order.pop()), parameters, allow_unused=True)
            with walk.exchange():
                gradients = _mean_over(walk.ranks, own, parameters)
            for parameter, gradient, mask in zip(parameters, gradients, entries, strict=True):
                if gradient is not None and gradient.stride() != parameter.stride():  # fused Adam goes by memory
                    gradient = torch.empty_like(parameter).copy_(gradient)
                # Adam leaves alone what never had a gradient, so what is pruned stays zero.
                parameter.grad = gradient if gradient is None or mask is None else gradient.mul_(mask)
            optimizer.step()
        after = mean_error()
        kept = after < before
        for parameter, value in zip(parameters, values, strict=True):
            if not kept:
                parameter.data.copy_(value)
            walk.ranks.copy_from(0, parameter.data)  # processors of several kinds round otherwise
    return BlockTuning(index, before, after if kept else before, steps, kept)


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
