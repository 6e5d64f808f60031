"""What a command prints, written when its work is done: a terminal, or a reader that is gone, cannot undo the work."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO


@contextmanager
def printed_at_the_end() -> Iterator[None]:
    """Keep what is printed on stdout within, and write it at the end.

    Characters that stdout's encoding lacks are escaped, as Python does on stderr. Where nobody reads stdout any more
    (`| head`), or it is closed, nothing is written, and what is within goes on to its own end and exit code.
    """
    kept = io.StringIO()
    try:
        with redirect_stdout(kept):
            yield
    finally:
        if sys.stdout is not None:
            _write(sys.stdout, kept.getvalue())


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:  # Python would write the rest when it exits, and fail again
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
