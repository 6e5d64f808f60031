"""Putting what a command measured into the report of the folder, which never costs the measurement."""

from __future__ import annotations

from collections.abc import Callable

from .printing import say


def may_record(folder: str) -> bool:
    """Whether the report of `folder` can be written; said on stderr if it cannot. To be asked before the work.

    Raises:
        CheckpointError: what is there is no report.
    """
    from ..engine.report import check_recordable

    return _succeeds(lambda: check_recordable(folder))


def recorded(put: Callable[[], bool]) -> bool:
    """Whether `put` found a report and wrote it; said on stderr if it could not be written."""
    found = []
    return _succeeds(lambda: found.append(put())) and found[0]


def _succeeds(action: Callable[[], object]) -> bool:
    from ..errors import OutputError

    try:
        action()
    except OutputError as error:
        say(f"warning: what is measured is not recorded: {error}")
        return False
    return True
