"""Which layer the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.hooks import Stop


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first module of `model` whose output holds NaN or infinity while `run` runs it; None without one.

    What wraps a model for training is left out of the name.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not _is_finite(output):
                found.append(name)
                raise Stop

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with suppress(Stop):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return plain_name(found[0]) or type(model).__name__ if found else None


def plain_name(name: str) -> str:
    """A name in a model without what PEFT and torch put before it.

    >>> plain_name("module.base_model.model.model.layers.0.mlp.up_proj")
    'model.layers.0.mlp.up_proj'
    """
    return name.removeprefix("module").removeprefix(".").removeprefix("base_model.model").removeprefix(".")


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))
