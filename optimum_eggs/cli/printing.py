"""What a command prints: on stdout its result, when its work is done; on stderr errors, warnings, and others' prints.

A terminal, or a reader that is gone, cannot undo the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TextIO

from ..errors import OutputError, first_line


@contextmanager
def printed_at_the_end() -> Iterator[None]:
    """Keep what is printed on stdout within, and write it at the end.

    Characters that stdout's encoding lacks are escaped, as Python does on stderr. Where nobody reads stdout any more
    (`| head`), or it is closed, nothing is written, and what is within goes on to its own end and exit code.

    Raises:
        OutputError: stdout cannot be written, as on a full disk, and nothing else went wrong.
    """
    kept = StringIO()
    failed = True
    try:
        with redirect_stdout(kept):
            yield
        failed = False
    finally:
        problem = _write(sys.stdout, kept.getvalue())
        if problem is not None and not failed and not isinstance(problem, BrokenPipeError):
            raise OutputError(f"standard output cannot be written ({first_line(problem)})") from problem


@contextmanager
def others_on_stderr() -> Iterator[None]:
    """Send what is printed on stdout within to stderr: libraries do that, and code that comes with models and tasks."""
    with redirect_stdout(sys.stderr):
        yield


def say(line: str) -> None:
    """Print a line on stderr, if anybody reads that."""
    _write(sys.stderr, f"{line}\n")


@contextmanager
def with_stderr() -> Iterator[None]:
    """Have a stderr within, also where it is closed or nobody reads it: tqdm needs one, and Python's exit code does."""
    if sys.stderr is None:  # as Python has one that is closed
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
        return
    try:
        yield
    finally:
        _write(sys.stderr, "")


def _write(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush; returns why it could not be done. What is written to such a stream later goes nowhere."""
    if stream is None:  # closed, as Python has it then
        return None
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:  # Python would write the rest when it exits, and fail again
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return error
    return None
