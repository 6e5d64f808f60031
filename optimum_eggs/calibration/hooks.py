"""What layers read, seen from outside while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Stop(Exception):  # noqa: N818 - no error: it ends a pass early
    """Ends a forward pass whose rest is not needed."""


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """What a linear layer that is called so reads."""
    return args[0] if args else kwargs["input"]


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[..., None]]) -> Iterator[None]:
    """Call each module's hook before it runs, for a while."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
