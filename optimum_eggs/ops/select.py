"""Which backend runs a packed layer, and why.

- `native`: a kernel in C on the packed form, the fastest for few tokens, and for many where it skips what is pruned.
- `panel`: rows unpacked in C, a few megabytes at a time, and multiplied by torch's dense product; for many tokens
  otherwise.
- `reference`: all unpacked by torch at every call, then `F.linear`; anywhere, and slow. It holds nothing beside the
  packed form.
- `dense`: all unpacked once, and held beside the packed form; then `F.linear` at every call. On GPUs and other devices,
  where no kernel is known to be faster.
- `triton`: a kernel for a few tokens on a GPU; `semi_structured`: torch's own sparse product there, for many. Only
  where they are forced, since no GPU has run them yet.

Where the processor multiplies float32 faster than 16 bits, `native` and `panel` cast many tokens and the values to it.

The environment variable `OPTIMUM_EGGS_BACKEND` forces one of them, `OPTIMUM_EGGS_ISA` an instruction set of the
processor (one of `optimum_eggs.ops.INSTRUCTION_SETS`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from . import native, triton
from .native import DTYPES, INSTRUCTION_SETS
from .wide import widens

BACKENDS = ("native", "panel", "reference", "dense", "triton", "semi_structured")
_MOST_TOKENS_TRITON = 8
MOST_TOKENS_CODED = 8
"""For which products of bytes are faster than values made of the integers."""
# The most tokens for which the native kernel beats the dense product, by instruction set: measured with benchmarks/
# layers.py for the AVX-512 ones, chosen with care for the others, which were not at hand by themselves.
_MOST_TOKENS = {"portable": 4, "neon": 8, "neon_dotprod": 8, "avx2": 12, "avx512": 48, "avx512_vbmi2": 48}
_MOST_TOKENS |= {"avx512_vnni": 48, "avx512_bf16": 48, "amx": 48}
# The same for bfloat16 where the processor multiplies it: AMX keeps up with the dense product at any number of tokens.
_MOST_TOKENS_BF16 = {"avx512_bf16": 512, "amx": 1 << 30}
# Tokens for which a dense weight of 16 bits is multiplied faster than by torch, which reads one token's fast itself but
# in bfloat16 where the processor multiplies it. Measured as well; not known for Arm.
_TOKENS_DENSE = {"avx2": range(2, 9), "avx512": range(2, 25), "avx512_vbmi2": range(2, 25), "avx512_vnni": range(2, 25)}
_TOKENS_DENSE |= {"avx512_bf16": range(2, 25), "amx": range(2, 25)}
_TOKENS_DENSE_BF16 = {"avx512_bf16": range(1, 25), "amx": range(1, 25)}


@dataclass(frozen=True)
class Choice:
    """The backend chosen, the instruction set if it is one of the processor's, and the reason in words.

    `wide`: values and activations are cast to float32 for it, which the reason says too.
    """

    backend: str
    isa: str | None
    why: str
    wide: bool = field(default=False, repr=False)


@dataclass
class _Forced:
    backend: str | None = None
    isa: str | None = None

    def check(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise ConfigError(f"backend {self.backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        if self.isa is not None and self.isa not in INSTRUCTION_SETS:
            there = ", ".join(INSTRUCTION_SETS) or f"none, since the extension is missing ({native.missing})"
            raise ConfigError(f"instruction set {self.isa!r} is not to be had here; there are: {there}")
        if self.backend in ("native", "panel") and not INSTRUCTION_SETS:
            raise ConfigError(f"backend {self.backend!r} needs the native extension, and {native.missing}")
        if self.backend == "triton" and (missing := triton.missing()):
            raise ConfigError(f"backend 'triton' cannot run: {missing}")


_forced = _Forced(os.environ.get("OPTIMUM_EGGS_BACKEND") or None, os.environ.get("OPTIMUM_EGGS_ISA") or None)


@contextmanager
def force(backend: str | None = None, isa: str | None = None) -> Iterator[None]:
    """Force a backend, an instruction set, or both, within the `with` block.

    Holds for the whole process, as the environment variables do. What a backend cannot take at all (a tensor on another
    device, a dtype it does not know) still goes to the reference.

    Raises:
        ConfigError: the name is unknown, or this machine does not have it.

    >>> with force("reference"):
    ...     choose(torch.bfloat16, torch.device("cpu"), tokens=1).backend
    'reference'
    """
    global _forced
    forced = _Forced(backend, isa)
    forced.check()
    before, _forced = _forced, forced
    publish()
    try:
        yield
    finally:
        _forced = before
        publish()


def publish() -> None:
    """Let the operation that compiled code calls know what is forced."""
    _decide.cache_clear()
    possible = _forced.backend in (None, "native") and (_forced.isa or "portable") in INSTRUCTION_SETS
    isa = (_forced.isa or INSTRUCTION_SETS[-1]) if possible else None
    for dtype in DTYPES:
        if isa is None:
            native.take(dtype, None)
            continue
        most = _most_tokens(isa, dtype) if _forced.backend is None else 1 << 62
        native.take(dtype, isa, most, _tokens_dense(isa, dtype), MOST_TOKENS_CODED)


def choose(
    dtype: torch.dtype, device: torch.device, tokens: int, in_features: int = 0, n: int = 0, m: int = 0
) -> Choice:
    """The backend for values and activations of `dtype` on `device`, by the number of tokens.

    Args:
        dtype: Of values and activations.
        device: Theirs.
        tokens: Rows of activations.
        in_features: Inputs of the layer; without them, a pattern that no kernel skips is taken for granted.
        n: Number kept of every m inputs.
        m: Size of a group.

    Raises:
        ConfigError: an environment variable forces what is not there.
    """
    return _decide(dtype, device.type, tokens, native.torch_may_hang(), (in_features, n, m) if in_features else None)


def dense_kernel(dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    """The instruction set whose kernel multiplies a dense weight of `dtype` faster than torch; None if none does."""
    choice = choose(dtype, device, tokens)
    if choice.backend != "native" or choice.isa is None:
        return None
    return choice.isa if tokens in _tokens_dense(choice.isa, dtype) else None


def dense_is_wide(dtype: torch.dtype, device: torch.device, tokens: int) -> bool:
    """Whether a dense weight that no kernel multiplies is multiplied faster in float32."""
    return tokens > 1 and _forced.backend is None and not native.torch_may_hang() and widens(dtype, device.type)


def _most_tokens(isa: str, dtype: torch.dtype) -> int:
    """The most tokens of a packed layer that a kernel multiplies."""
    return max(_MOST_TOKENS[isa], _MOST_TOKENS_BF16.get(isa, 0) if dtype is torch.bfloat16 else 0)


def _tokens_dense(isa: str, dtype: torch.dtype) -> range:
    """Tokens of a dense layer that a kernel multiplies."""
    if dtype is torch.bfloat16 and isa in _TOKENS_DENSE_BF16:
        return _TOKENS_DENSE_BF16[isa]
    return range(0) if dtype is torch.float32 else _TOKENS_DENSE.get(isa, range(0))


def holds() -> bool:
    """Whether anything may be held beside the packed form: not where the `reference` is forced."""
    return _forced.backend != "reference"


@lru_cache(maxsize=4096)
def _decide(
    dtype: torch.dtype, device: str, tokens: int, torch_may_hang: bool, layer: tuple[int, int, int] | None
) -> Choice:
    _forced.check()
    if _forced.backend == "dense" and device != "meta":
        return Choice("dense", None, "forced")
    if device == "cuda" and dtype in DTYPES:
        if _forced.backend == "triton" and tokens <= _MOST_TOKENS_TRITON:
            return Choice("triton", None, "forced")
        if _forced.backend == "semi_structured":
            return Choice("semi_structured", None, "forced; layers that torch has no such product for are unpacked")
    if device not in ("cpu", "meta") and _forced.backend is None:
        return Choice("dense", None, f"no kernel is known to be faster on {device}; layers hold their dense weights")
    if device != "cpu":
        return Choice("reference", None, f"the native kernels run on the CPU, and the tensors are on {device}")
    if dtype not in DTYPES:
        return Choice("reference", None, f"the native kernels take float32, float16 and bfloat16, not {dtype}")
    if not INSTRUCTION_SETS:
        native.warn_missing()
        return Choice("reference", None, f"the native extension is missing: {native.missing}")
    isa = _forced.isa or INSTRUCTION_SETS[-1]
    if _forced.backend in ("triton", "semi_structured"):
        return Choice("reference", None, f"the backend {_forced.backend!r} runs on a GPU")
    if _forced.backend is not None:
        return Choice(_forced.backend, None if _forced.backend == "reference" else isa, "forced")
    most = _most_tokens(isa, dtype)
    if tokens <= most:
        return Choice("native", isa, f"{tokens} tokens: up to {most}, {isa} beats the dense product")
    if widens(dtype, device) and not torch_may_hang:
        wide = _decide(torch.float32, device, tokens, torch_may_hang, layer)
        return replace(wide, why=f"{wide.why}; in float32, which this processor multiplies faster", wide=True)
    if layer and native.skips(isa, dtype, *layer):
        why = f"{tokens} tokens: with {layer[1]}:{layer[2]} {isa} beats the dense product whatever their number"
        return Choice("native", isa, why)
    if torch_may_hang:
        return Choice(
            "native", isa, "the dense product may hang after a fork, unless torch.set_num_threads(1) is called"
        )
    return Choice("panel", isa, f"{tokens} tokens: beyond {most}, the dense product on unpacked panels is faster")


def explain(layer: torch.nn.Module, batch: int = 1) -> Choice:
    """What a packed layer does with `batch` tokens, and why.

    Raises:
        ShapeError: the layer is not packed.

    >>> from optimum_eggs import NMLinear, NMPattern
    >>> layer = NMLinear.from_linear(torch.nn.Linear(8, 3), NMPattern(2, 4))
    >>> with force("reference"):
    ...     explain(layer, batch=1)
    Choice(backend='reference', isa=None, why='forced')
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(layer, "weight_meta"):
        raise ShapeError(f"{type(layer).__name__} is not a packed layer; pass an NMLinear")
    if not weight.is_floating_point():
        return _of_integers(layer, batch)
    return choose(weight.dtype, weight.device, batch, *_shape(layer))


def _shape(layer: Any) -> tuple[int, int, int]:
    return layer.in_features, *((0, 0) if layer.pattern is None else (layer.pattern.n, layer.pattern.m))


def _of_integers(layer: torch.nn.Module, batch: int) -> Choice:
    """For a layer of integers, by the dtype of its bias; float32 without one, for the layer has none of its own."""
    bias, device = getattr(layer, "bias", None), next(layer.parameters()).device
    found = choose(torch.float32 if bias is None else bias.dtype, device, batch, *_shape(layer))
    if found.backend == "native" and batch <= MOST_TOKENS_CODED:
        return Choice("native", found.isa, f"{batch} tokens: rounded to bytes up to {MOST_TOKENS_CODED}")
    if found.backend == "dense":  # which holds the dense weights of floats
        return Choice("reference", None, "values are made of the integers and unpacked at every call; nothing is held")
    return Choice(found.backend, found.isa, f"values are made of the integers at every call; then: {found.why}")
