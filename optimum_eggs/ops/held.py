"""What is made of a layer's tensors once, and read by every call for as long as they are what they were.

It hangs on the tensors by weak references: no state dict, copy or pickle has it, and it goes when they go. torch counts
the changes of a tensor in place, and its memory tells when `.data` was replaced. What torch does not count is not seen:
changes of `.data` in place, as for torch's own gradients, and those by other means than torch's operations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .. import measure  # whole or not: it may be what imports torch, and so this module
from ..packing.pack import unpack
from ..pattern import NMPattern

_held = WeakIdKeyDictionary()  # `Held`, by the first of the tensors it is made of


@dataclass
class Held:
    """The state of the tensors that things are made of, and these things by their keys."""

    stamp: list[Any]
    made: dict[Hashable, Tensor] = field(default_factory=dict)


def find(key: Hashable, *sources: Tensor) -> Tensor | None:
    """What is held of `sources` for `key`; None if nothing, if they have changed, or while a CUDA graph is captured.

    A graph reads by address at every replay, and what is held may go meanwhile.
    """
    held = _held.get(sources[0])
    if held is None or key not in held.made or held.stamp != _stamp(sources) or _capturing(sources[0]):
        return None
    return held.made[key]


def hold(key: Hashable, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
    """What [`find`] finds, or else what `make` makes, held from now on.

    It is made for this call alone while a CUDA graph is captured, and of tensors whose changes torch does not count:
    inference tensors, and those without memory that torch knows.
    """
    found = find(key, *sources)
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    stamp = _stamp(sources)
    if stamp is None or _capturing(sources[0]):
        return made
    measure.finish([made.device])  # once, since calls in other streams read it too
    held = _held.get(sources[0])
    if held is None or held.stamp != stamp:
        held = _held[sources[0]] = Held(stamp)
    held.made[key] = made
    return made


def forget(*sources: Tensor | None) -> None:
    """Let go of all that is held of tensors, each as the first of what it was made of."""
    for source in sources:
        if source is not None:
            _held.pop(source, None)


def find_dense(weight: Tensor, weight_meta: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor | None:
    """The dense weight (out, in) in `dtype` that is held of a packed one, if there is one."""
    return find(("dense", n, m, dtype), weight, weight_meta)


def hold_dense(weight: Tensor, weight_meta: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) in `dtype` of a packed one (out, in·n/m), held from now on."""

    def make() -> Tensor:
        if _capturing(weight):
            _say_captured()
        else:
            _say_dense(weight.device.type)
        return unpack(weight.detach().to(dtype), weight_meta, NMPattern(n, m))

    return hold(("dense", n, m, dtype), make, weight, weight_meta)


@cache
def _say_dense(device: str) -> None:
    logging.getLogger(__name__).warning(
        "packed layers on %s multiply by dense weights, since no kernel is known to be faster there. From its first "
        "call in eval mode without gradients of its weight on, each layer holds its own beside the packed one: the "
        "memory of the dense and of the packed model together. OPTIMUM_EGGS_BACKEND=reference holds none and unpacks "
        "at every call, which is slow; model.dequantize() keeps the dense ones alone",
        device,
    )


@cache
def _say_captured() -> None:
    logging.getLogger(__name__).warning(
        "a packed layer in a CUDA graph unpacks at every replay, which is slow: a graph would read what is held at an "
        "address where it may no longer be. For inference by graphs, call model.dequantize() first"
    )


def _stamp(sources: tuple[Tensor, ...]) -> list[Any] | None:
    """What changes when the tensors do; None for those whose changes are not counted."""
    stamp = []
    for source in sources:
        if source.is_inference() or not torch._C._has_storage(source):
            return None
        # An address is used again once its memory is free; what refers to memory weakly, never for other memory.
        memory = StorageWeakRef(source.untyped_storage())
        stamp.append((memory, source.data_ptr(), source.shape, source.stride(), source._version))
    return stamp


def _capturing(tensor: Tensor) -> bool:
    """Whether what is computed on the tensor's device is captured by a graph of it (CUDA, XPU)."""
    of_device: Any = getattr(torch, tensor.device.type, None)
    if not hasattr(of_device, "is_current_stream_capturing"):
        return False
    with of_device.device(tensor.device):  # it asks of the current device
        return bool(of_device.is_current_stream_capturing())
