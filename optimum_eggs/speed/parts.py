"""Where the time of a decoded token goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import devices_of
from ..nn import CodedLinear, is_dense_linear, is_packed
from ..nn.experts import SplitExperts
from .timing import alternate


@dataclass(frozen=True)
class TokenParts:
    """What a step that decodes one token for each sequence takes. Times are medians, in seconds.

    `matrices` is that of the linear layers of the blocks, `head` that of the output head; the `rest` of the `step` is
    norms, attention, the cache, sampling and Python, and the experts of a mixture, of which each token reads others.
    `read` is how many bytes of weights all of these layers hold, each tensor once, and `limit` the share of the step in
    which the memory gives them; None on a GPU, and without the extension, which reads it.
    """

    step: float
    matrices: float
    head: float
    rest: float
    read: int
    limit: float | None


@torch.no_grad()
def time_parts(model: Any, step: float, tokens: Tensor, repeats: int, bandwidth: float | None) -> TokenParts:
    """Time the linear layers of `model` on what they get when it reads `tokens` (sequences, 1), of a `step` known.

    All are called from Python in the order in which the model calls them, `repeats` times, so that each finds its
    weights in memory as it does in decoding. `bandwidth` is the memory's, in bytes per second.
    """
    calls: list[tuple[nn.Module, Callable[[], object]]] = []

    def seen(module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        calls.append((module, partial(module, *args, **kwargs)))

    experts = {each for module in model.modules() if isinstance(module, SplitExperts) for each in module.modules()}
    linear = [module for module in model.modules() if _is_linear(module) and module not in experts]
    hooks = [module.register_forward_hook(seen, with_kwargs=True) for module in linear]
    try:
        model(input_ids=tokens, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    runs = [partial(_call, [call for module, call in calls if (module is head) == last]) for last in (False, True)]
    matrices, last = alternate(runs, repeats, devices=devices_of(model))
    held = {part.data_ptr(): part.nbytes for module, _ in calls for part in (*module.parameters(), *module.buffers())}
    read, rest = sum(held.values()), step - matrices.median - last.median
    return TokenParts(
        step, matrices.median, last.median, rest, read, None if bandwidth is None else read / bandwidth / step
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | CodedLinear) or is_packed(module) or is_dense_linear(module)


def _call(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()
