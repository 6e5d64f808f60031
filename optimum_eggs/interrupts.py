"""Ctrl-C, held back for a moment where it would leave something half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """Hold an interrupt back while within, and raise it at the end; a second one is raised at once.

    Only Python's own way with an interrupt is changed so, which is that of the main thread; a handler of the user's, or
    none, stays.

    Raises:
        KeyboardInterrupt: one came. It takes the place of an exception from within, which is its `__context__`.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
