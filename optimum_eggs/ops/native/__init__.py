"""The kernels in C, called with addresses: the extension `_native`, built with the package where there is a compiler.

Callers of this module have checked shapes, dtypes and contiguity.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch  # before the extension, so that both use the OpenMP runtime that torch brings
from torch import Tensor

missing: str | None = None
"""Why there are no kernels, if there are none."""
try:
    _native: Any = importlib.import_module("._native", __name__)
except ModuleNotFoundError:
    _native, missing = None, "it was not built, since there was no C compiler when the package was installed"
except ImportError as error:  # it was built elsewhere, or for another Python
    _native, missing = None, f"it cannot be loaded: {error}"

_torch_ops: Any = None  # from `register` on, if they are there

MOST_DIM = 256  # the largest head that `attend` takes: NM_MOST_DIM
MOST_COMPARED = 16  # the largest m that `topn` takes: NM_TOPN_LARGEST
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INDEX: dict[str, int] = _native.instruction_sets() if _native else {}
INSTRUCTION_SETS = tuple(_INDEX)  # those this processor runs, the fastest last
most_direct: dict[torch.dtype, int] = {}
"""Tokens of a packed layer up to which the operation of torch has a kernel of its own, by dtype."""
_forked = False  # a forked child has lost the threads that the parent's OpenMP waits for


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def register(library: str = "libtorch_cpu.so") -> str | None:
    """Make the operations, which must be defined, known to torch by their kernels; or say why they are not."""
    global _torch_ops
    if _native is None:
        return missing
    try:
        found = importlib.import_module("._torch_ops", __name__)
        found.register(str(Path(torch.__file__).parent / "lib" / library), _native.kernels)
    except ModuleNotFoundError:
        return "they were not built, since there was no C++ compiler when the package was installed"
    except (ImportError, AttributeError, OSError, ValueError) as error:  # built elsewhere, or a part of it before
        return f"they cannot be loaded: {error}"
    _torch_ops = found
    return None


def registered() -> bool:
    """Whether the operations have kernels for the CPU that are called without Python."""
    return _torch_ops is not None


def take(dtype: torch.dtype, isa: str | None, most: int = 0, dense: range = range(0), most_coded: int = 0) -> None:
    """Say what the operation's own kernel is to take: up to how many tokens, by which instruction set; or nothing.

    Args:
        dtype: Of the activations.
        isa: The instruction set, or None for nothing.
        most: The most tokens of a packed layer.
        dense: Tokens of a dense one.
        most_coded: The most tokens of one of integers, whatever the dtype.
    """
    most_direct.pop(dtype, None)
    if _torch_ops is not None:
        if isa is not None:
            most_direct[dtype] = most
        _torch_ops.choose(
            DTYPES[dtype], -1 if isa is None else _INDEX[isa], most, dense.start, dense.stop - 1, most_coded
        )


def threads() -> int:
    """Threads a kernel may use: torch's own number, or one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def torch_may_hang() -> bool:
    """Whether torch's products may wait for ever: in a forked child, for the threads that stayed with the parent."""
    return _forked and torch.get_num_threads() > 1


@lru_cache(maxsize=1)
def warn_missing() -> None:
    """Say, once, that the package was built without its extension."""
    logging.getLogger(__name__).warning(
        "packed layers unpack at every call, which is slow: the native extension of optimum-eggs is missing, %s. "
        "Install a C compiler (gcc or clang) and Python's headers, and run `pip install -e .` in a clone of the "
        "repository",
        missing,
    )


@lru_cache(maxsize=256)
def skips(isa: str, dtype: torch.dtype, in_features: int, n: int, m: int) -> bool:
    """Whether the kernel for `isa` skips what n:m prunes, and beats the dense product with any number of tokens."""
    return bool(_native.skips(_INDEX[isa], DTYPES[dtype], in_features, n, m))


def linear(
    isa: str, x: Tensor, weight: Tensor, weight_meta: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """X (..., in), contiguous, to (..., out), by the kernel for `isa`; no `weight_meta` if dense, and n = m."""
    out_features, width = weight.shape
    in_features = x.shape[-1]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    _native.linear(
        _INDEX[isa],
        DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        0 if weight_meta is None else weight_meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        out_features,
        in_features,
        width,
        n,
        m,
        threads(),
    )
    return y


def coded_linear(
    isa: str,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_meta: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    bits: int,
    group: int,
) -> Tensor:
    """X (..., in), contiguous, to (..., out), by the kernel for `isa`; scale in bfloat16; no `weight_meta` if dense."""
    out_features, in_features = len(codes), x.shape[-1]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    _native.coded(
        _INDEX[isa],
        DTYPES[x.dtype],
        bits,
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        0 if weight_meta is None else weight_meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        out_features,
        in_features,
        in_features // m * n,
        group,
        n,
        m,
        threads(),
    )
    return y


def decode(isa: str, codes: Tensor, scale: Tensor, values: Tensor, per_scale: int, bits: int) -> None:
    """Write the values (out, width) of codes (out, ⌈width · bits/8⌉) and scales (out, scales), bfloat16; contiguous."""
    _native.decode(
        _INDEX[isa],
        codes.data_ptr(),
        scale.data_ptr(),
        values.data_ptr(),
        *values.shape,
        per_scale,
        scale.shape[1],
        bits,
        DTYPES[values.dtype],
        threads(),
    )


def unpack(isa: str, weight: Tensor, weight_meta: Tensor, dense: Tensor) -> None:
    """Write the dense rows (rows, in) of packed rows weight (rows, width), weight_meta (rows, ⌈in/8⌉); contiguous."""
    _native.unpack(
        _INDEX[isa],
        weight.data_ptr(),
        weight_meta.data_ptr(),
        dense.data_ptr(),
        *dense.shape,
        weight.shape[1],
        weight.element_size(),
        threads(),
    )


def pack(dense: Tensor, weight_meta: Tensor, weight: Tensor) -> None:
    """Write what dense rows (rows, in) hold at the kept positions to weight (rows, width); all contiguous."""
    _native.pack(
        dense.data_ptr(),
        weight_meta.data_ptr(),
        weight.data_ptr(),
        *dense.shape,
        weight.shape[1],
        weight.element_size(),
        threads(),
    )


def topn(score: Tensor, n: int, m: int) -> Tensor:
    """The mask (out, in) of the n largest of every m scores (out, in), float32 and contiguous; m ≤ `MOST_COMPARED`."""
    kept = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    _native.topn(score.data_ptr(), kept.data_ptr(), score.numel() // m, n, m, threads())
    return kept


def stream(data: Tensor) -> None:
    """Read a contiguous tensor once, as fast as the machine can; its address must be a multiple of 64."""
    _native.stream(data.data_ptr(), data.numel() * data.element_size(), threads())
