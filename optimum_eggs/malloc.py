"""What the C library does with memory that is freed; where it is not glibc, nothing here has an effect."""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed. Returns whether it does.

    It gives every block of some megabytes back to the system, which fills it with zeros when it is asked for again, at
    every step of training. Holds for the rest of the process.
    """
    library = _glibc()
    if library is None:
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and library.mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def give_back_freed_memory() -> bool:
    """Have the C library give the system what it keeps of smaller blocks that were freed. Returns whether it has any.

    It does so by itself at the end of its memory alone; what lies between blocks in use comes to a hundred megabytes or
    two while a model of a billion parameters is pruned. Takes milliseconds.
    """
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
