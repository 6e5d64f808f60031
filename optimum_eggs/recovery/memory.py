"""Memory that training frees and takes again at every step."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, where that is glibc. Returns whether it does.

    It gives every block of some megabytes back to the system, which fills it with zeros when it is asked for again, at
    every step of training. Holds for the rest of the process.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and library.mallopt(_M_TRIM_THRESHOLD, _LARGEST))
