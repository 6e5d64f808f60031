"""Layers whose weights accelerate keeps elsewhere, on the disk or in another memory, while they do not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a tensor of `module` itself is elsewhere now, and a hook brings it for the forward pass."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return "_hf_hook" in vars(module) and any(tensor is not None and tensor.is_meta for tensor in tensors)


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Have the tensors of those modules that are offloaded where the modules run, within the `with` block."""
    with ExitStack() as stack:
        for module in filter(is_offloaded, modules):
            hook: Any = module._hf_hook
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def follow(module: nn.Module, before: nn.Module) -> nn.Module:
    """Let `module`, on any device, be where `before` is, run where that runs and be offloaded as it is.

    What is offloaded is then kept in the CPU's memory. Returns `module`.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for hook in _aligning(before):
        copied = AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=hook.offload,
            io_same_device=hook.io_same_device,
            offload_buffers=hook.offload_buffers,
            skip_keys=hook.skip_keys,
        )
        add_hook_to_module(module, copied, append=True)
    return module


def _aligning(module: nn.Module) -> list[Any]:
    """The hooks of a module that are accelerate's `AlignDevicesHook`."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [each for each in hooks if isinstance(each, AlignDevicesHook)]
