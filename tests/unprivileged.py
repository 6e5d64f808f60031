"""Being a user whom permissions hold for: they do not for root, whom containers run tests as."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

VERSION = 0x20080522  # of the structures of capset(2), which is Linux's


def can_become_ordinary() -> bool:
    """Whether there is a way to be one: root has none but on Linux."""
    return sys.platform == "linux" or os.geteuid() != 0


def become_ordinary() -> None:
    """Give up what root may do beyond its own files, for the rest of this process."""
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(struct.pack("Ii", VERSION, 0), bytes(24)):
        raise OSError("what root may do cannot be given up")
