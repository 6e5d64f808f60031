"""A Triton kernel for decoding on a GPU.

Run so far in Triton's interpreter alone, on no GPU: it is correct there, and its speed is unknown. It is therefore
never chosen by itself; `OPTIMUM_EGGS_BACKEND=triton` asks for it.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor


def missing() -> str | None:
    """Why the kernel cannot run, or None."""
    return None if find_spec("triton") else "the package triton is not installed"


def linear(x: Tensor, weight: Tensor, weight_meta: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """X (..., in), contiguous, to (..., out), for a few tokens: see [`optimum_eggs.ops.triton.decode`]."""
    from .decode import decode

    return decode(x, weight, weight_meta, bias, n, m)
