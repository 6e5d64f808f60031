"""What is made of a layer's tensors once, and read by every call for as long as they are what they were.

It hangs on the tensors by weak references: no state dict, copy or pickle has it, and it goes when they go. torch counts
the changes of a tensor in place, and its address tells when `.data` was replaced. Changes of `.data` in place are not
counted, as for torch's own gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..packing import unpack
from ..pattern import NMPattern

_dense = WeakIdKeyDictionary()  # dense weights, by the packed ones


@dataclass
class Held:
    """What was made; of what; and whether a CUDA graph reads it, so that it must stay where it is."""

    made: Tensor
    stamp: list[Any] | None
    captured: bool = False


def find(store: WeakIdKeyDictionary, key: Any, *sources: Tensor) -> Tensor | None:
    """What `store` holds of `sources` for `key`, by the first of them; None if nothing, or they have changed."""
    held = store.get(sources[0])
    if held is None or held.stamp is None or held.stamp != _stamp(key, sources):
        return None
    held.captured = held.captured or _capturing(sources[0])
    return held.made


def hold(store: WeakIdKeyDictionary, key: Any, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
    """What [`find`] finds, or else what `make` makes, held from now on.

    It is made for this call alone while a CUDA graph is captured, in whose memory it would be, and of inference
    tensors, whose changes torch does not count.
    """
    found = find(store, key, *sources)
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    stamp = _stamp(key, sources)
    if stamp is None or _capturing(sources[0]):
        return made
    before = store.get(sources[0])
    if before is not None and before.captured and _alike(before.made, made):
        before.made.copy_(made)
        made, before.stamp = before.made, stamp
    else:
        store[sources[0]] = Held(made, stamp)
    if made.is_cuda:  # once, since calls in other streams read it too
        torch.cuda.current_stream(made.device).synchronize()
    return made


def forget(weight: Tensor | None) -> None:
    """Let go of the dense weight held beside a packed one; what a CUDA graph reads stays, to be made again."""
    held = None if weight is None else _dense.pop(weight, None)
    if held is not None and held.captured:
        held.stamp = None
        _dense[weight] = held


def take(weight: Tensor | None) -> Held | None:
    """Take off what hangs on `weight`, which keeps torch from swapping it for another."""
    return None if weight is None else _dense.pop(weight, None)


def put_back(held: Held | None, weight: Tensor | None, weight_meta: Tensor) -> None:
    """Put back what [`take`] took, if the tensors are where they were."""
    if held is None or weight is None:
        return
    if held.stamp is None or held.stamp == _stamp(held.stamp[0], (weight, weight_meta)):
        _dense[weight] = held


def find_dense(weight: Tensor, weight_meta: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor | None:
    """The dense weight (out, in) in `dtype` that is held of a packed one, if there is one."""
    return find(_dense, (n, m, dtype), weight, weight_meta)


def hold_dense(weight: Tensor, weight_meta: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) in `dtype` of a packed one (out, in·n/m), held from now on."""

    def make() -> Tensor:
        if _capturing(weight):
            say_unheld()
        else:
            _say_dense(weight.device.type)
        return unpack(weight.detach().to(dtype), weight_meta, NMPattern(n, m))

    return hold(_dense, (n, m, dtype), make, weight, weight_meta)


@cache
def _say_dense(device: str) -> None:
    logging.getLogger(__name__).warning(
        "packed layers on %s multiply by dense weights, since no kernel is known to be faster there. From its first "
        "call in eval mode on, each layer holds its own beside the packed one: the memory of the dense and of the "
        "packed model together. OPTIMUM_EGGS_BACKEND=reference holds none and unpacks at every call, which is slow; "
        "model.dequantize() keeps the dense ones alone",
        device,
    )


@cache
def say_unheld() -> None:
    """Say, once, that a graph unpacks at every call what could be held."""
    logging.getLogger(__name__).warning(
        "a packed layer in a compiled or captured graph unpacks at every call, since it holds no dense weight yet. For "
        "inference, call the model once in eval mode under torch.no_grad() before it is compiled or captured"
    )


def _stamp(key: Any, sources: tuple[Tensor, ...]) -> list[Any] | None:
    """What changes when the tensors do; None for those whose changes are not counted."""
    stamp = [key]
    for source in sources:
        if source.is_inference():
            return None
        stamp += (source._version, source.data_ptr())  # all devices share one space of addresses
    return stamp


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _capturing(tensor: Tensor) -> bool:
    """Whether what is computed on the tensor's device is captured by a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
