"""Where an output may be written, decided before the work begins; it is a whole model then, or none.

An output that is not there, or replaces one of ours, is made in a hidden folder beside it and renamed. A folder that is
there and empty, which may be a mount point, is filled from a hidden folder in it, the configuration last. The hidden
folder is locked.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .access import absolute, closed, is_there, kind, no_utf8
from .errors import EGGSError, ModelError, OutputError, first_line, led_by, more
from .files import REPORT_NAME, changed_files, listed_files, seal, sync
from .interrupts import held_back
from .locks import LOCK_NAME, OWNER_NAME, locked

_UNFINISHED, _MADE, _OLD = "unfinished", "made", "old"
_NOTHING = {f".{_UNFINISHED}", "lost+found"}  # the latter is in every new file system of some kinds
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (*_NO_SPACE, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_SAID_OF_NO_SPACE = (  # by writers whose errors are no OSError: those in Rust, and torch's
    *(f"os error {number}" for number in _NO_SPACE),
    "file write failed",
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)
PUT_IN_PLACE: list[Path] = []
"""The outputs that this process has put in place, in that order."""


def said_in_place(since: int) -> list[str]:
    """What an interrupted user is told of each of [`PUT_IN_PLACE`] but the first `since`."""
    return [f"{path} is whole and in place" for path in PUT_IN_PLACE[since:]]


def check_folder(folder: str | Path, option: str = "") -> None:
    """Raise unless there is such a folder.

    Args:
        folder: That of a saved model.
        option: What it was given by, for the message, such as `"--against"`.

    Raises:
        ModelError: there is none, it is something else, may not be read, or has a name that is no UTF-8.
    """
    path, named = Path(folder), f"{option} {folder}".strip() or "''"
    what = kind(path)
    if not str(folder) or not (what or is_there(path)):
        raise ModelError(f"{named}: there is no such {'file' if path.suffix == '.gguf' else 'folder'}; check the path")
    why = closed(path) or no_utf8(absolute(path))
    if why:
        raise ModelError(f"{named}: {why}")
    if what != "folder":
        what = f"link to {path.readlink()}, which is not there" if what == "link" else what
        raise ModelError(f"{named}: is a {what}; name the folder of a saved model")


def check_output(folder: str | Path, overwrite: bool = False, *, sources: Sequence[Any] = (), needs: int = 0) -> Path:
    """Raise unless `folder` may be written. Nothing is written for it.

    It may be a folder that is not there, one that is empty, or one that holds nothing but what this package wrote, as
    its record lists it, and is to be overwritten.

    Args:
        folder: Where the output is to be.
        overwrite: Whether what is there may be replaced.
        sources: Folders and files that are read; those that are no paths of anything here are passed over.
        needs: Bytes that will be written.

    Returns:
        The folder's absolute path, links followed.

    Raises:
        OutputError: it may not, and why.
    """
    if not str(folder):
        raise OutputError("the name of the output folder is empty; name a folder")
    path = Path(folder)
    try:
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path}: is a link to {path.readlink()}, which is not there; remove it, or name another")
        path = path.resolve()
        why = no_utf8(path)
        if why:
            raise OutputError(f"{path}: {why}, or name another folder")
        _check_sources(path, sources)
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a {kind(path)}; name a folder")
        if not _is_free(path):
            _check_ours(path, overwrite)
            _check_replaceable(path)
        _check_room(path, needs)
    except (OSError, RuntimeError) as error:  # a RuntimeError is what a loop of links becomes in older versions
        if isinstance(error, EGGSError):
            raise
        raise OutputError(f"{path}: cannot be written ({first_line(error)}); name another folder") from error
    return path


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """The hidden folder that the output `path` of [`check_output`] is made in, locked; removed if nothing is in it.

    Raises:
        OutputError: another process writes the same output, or the folder cannot be made.
    """
    inside = path.is_dir() and _is_free(path)
    work = path / f".{_UNFINISHED}" if inside else _beside(path)
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(work))
            _put_back(path, work)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({first_line(error)}); name another folder") from error
        try:
            yield work
        finally:
            if work.is_dir() and not {entry.name for entry in work.iterdir()} - {LOCK_NAME, OWNER_NAME}:
                shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_folder(
    folder: str | Path, overwrite: bool = False, *, sources: Sequence[Any] = (), needs: int = 0
) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when everything within succeeded, and is removed otherwise.

    Raises:
        OutputError: as [`check_output`] and [`claimed`], or the disk is full.
    """
    path = check_output(folder, overwrite, sources=sources, needs=needs)
    with claimed(path) as work, written(path, "once it can be, give the same command again"):
        check_output(path, overwrite)  # another process may just have finished it
        made = work / _MADE
        shutil.rmtree(made, ignore_errors=True)  # left by a process that was killed
        try:
            made.mkdir()
            yield made
            check_output(path, overwrite)  # something may have been put there meanwhile
            put_in_place(made, path, work)
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def written(path: Path, remedy: str) -> Iterator[None]:
    """Turn a disk that is full, or may not be written, into an error that says how to go on.

    Raises:
        OutputError: instead of what was raised within because of it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except EGGSError:
        raise
    except Exception as error:
        if not isinstance(error, SafetensorError) and not any(_is_of_writing(each, path) for each in led_by(error)):
            raise
        raise OutputError(f"{path}: cannot be written ({first_line(error)}); {remedy}") from error


def put_in_place(made: Path, path: Path, work: Path, clear: bool = False) -> None:
    """Make the finished folder `made`, in `work`, be the output `path`: all of it is listed, readable and on disk.

    Args:
        made: All that is to be in the output.
        path: Absolute path of the output.
        work: Hidden folder of the output.
        clear: Remove `work` too, with all that runs have left in it.

    Raises:
        KeyboardInterrupt: if it comes when the output is in place, with that in its message.
    """
    seal(made)
    mode = stat.S_IMODE((made / REPORT_NAME).stat().st_mode)  # as any file that is made here; weights are made private
    for file in made.rglob("*"):
        if file.is_file():
            file.chmod(mode)
        sync(file)
    sync(made)
    before = len(PUT_IN_PLACE)
    try:
        with held_back():
            _exchange(made, path, work)
            PUT_IN_PLACE.append(path)
            shutil.rmtree(work if clear else work / _OLD, ignore_errors=True)
            sync(path if work.parent == path else path.parent)
    except KeyboardInterrupt:
        said = said_in_place(before)
        if said:
            raise KeyboardInterrupt(said[0]) from None
        raise


def _exchange(made: Path, path: Path, work: Path) -> None:
    """Put the finished folder in place of what is there; where that fails, all is as it was."""
    if not path.is_dir():
        made.rename(path)
    elif work.parent == path:
        names = [entry.name for entry in sorted(made.iterdir(), key=_order_of_moving)]
        try:
            for name in names:
                _remove(path / name)
                (made / name).rename(path / name)
        except BaseException:
            for name in reversed(names):
                _remove(path / name)
            raise
    else:
        old = work / _OLD
        shutil.rmtree(old, ignore_errors=True)
        _refuse_filled(path)
        try:
            path.rename(old)
            made.rename(path)
        except BaseException:
            if old.is_dir() and not path.exists():
                old.rename(path)
            raise


def _order_of_moving(entry: Path) -> tuple[bool, bool, str]:
    """The record first, so that a folder cut then is known for ours; the configuration, which makes a model, last."""
    return entry.name == "config.json", entry.name != REPORT_NAME, entry.name


def _check_sources(path: Path, sources: Sequence[Any]) -> None:
    for source in sources:
        if not isinstance(source, str | Path) or not str(source) or not is_there(source) or closed(Path(source)):
            continue
        read = Path(source).resolve()
        if path.exists() and (path.samefile(read) or (read.is_file() and path.samefile(read.parent))):
            raise OutputError(f"{path}: is {source} itself, which is read; name another folder for what is written")
        if path in read.parents:
            raise OutputError(f"{path}: holds {source}, which is read; name another folder for what is written")


def _is_free(path: Path) -> bool:
    """Whether there is no such folder, or nothing in it that counts, or what a run has left that was filling it."""
    if not path.exists():
        return True
    found = {entry.name for entry in path.iterdir()}
    unfinished = f".{_UNFINISHED}" in found
    return not found - _NOTHING or (unfinished and not _others(path) and not (path / "config.json").exists())


def _check_ours(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{path}: exists and is not empty; name another folder, or pass --overwrite (overwrite=True)")
    if not listed_files(path):
        raise OutputError(
            f"{path}: is not empty, and has no list of files in a {REPORT_NAME} of this package, so it is not known "
            "what may be replaced; remove it yourself, or name another folder"
        )
    others = _others(path) or changed_files(path)
    if others:
        raise OutputError(
            f"{path}: {others[0]}{more(others, 1)} in it was not written by this package, or changed since, so the "
            "folder is not replaced; move that away, or name another folder"
        )


def _others(path: Path) -> list[str]:
    """What is in a folder and not in its list, by name; empty folders that hold nothing of the list too."""
    listed = listed_files(path)
    ours = {*listed, *(parent.as_posix() for name in listed for parent in Path(name).parents)}
    found = [entry.relative_to(path) for entry in path.rglob("*")]
    return sorted(name.as_posix() for name in found if name.as_posix() not in ours and name.parts[0] not in _NOTHING)


def _check_replaceable(path: Path) -> None:
    here = Path.cwd()
    if path.is_mount() or path == here or path in here.parents:
        what = "a mount point" if path.is_mount() else "the folder you are in"
        raise OutputError(f"{path}: is {what}, which cannot be replaced; empty it, or name another folder")


def _check_room(path: Path, needs: int) -> None:
    # An empty folder is filled, one that is replaced is renamed in its parent.
    beside = path if path.is_dir() and _is_free(path) else path.parent
    there = next(parent for parent in (beside, *beside.parents) if parent.exists())
    if not there.is_dir():
        raise OutputError(f"{path}: {there} is no folder, so nothing can be in it; name another folder")
    # To be moved to another parent, a folder itself must be writable.
    refusing = next((each for each in (there, path) if each.exists() and not os.access(each, os.W_OK | os.X_OK)), None)
    if refusing is not None:
        raise OutputError(f"{path}: {refusing} may not be written to; name another folder, or change its permissions")
    free = shutil.disk_usage(there).free
    if needs > free:
        raise OutputError(
            f"{path}: about {needs / 1e6:,.1f} MB will be written, and {free / 1e6:,.1f} MB are free there; free some, "
            "or name a folder on another disk"
        )


def _refuse_filled(path: Path) -> None:
    """Raise if another process fills the folder, which was empty when it began.

    Raises:
        OutputError: it does.
    """
    if (path / f".{_UNFINISHED}" / LOCK_NAME).is_file():
        with locked(path / f".{_UNFINISHED}"):
            pass


def _put_back(path: Path, work: Path) -> None:
    """Undo, or end, the exchange of folders of a process that was killed within it."""
    old = work / _OLD
    if old.is_dir() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _is_of_writing(error: BaseException, path: Path) -> bool:
    """Whether an error says that something cannot be written, or comes of a file of the output `path`."""
    if not isinstance(error, OSError):
        return any(text in str(error) for text in _SAID_OF_NO_SPACE)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    ours = Path(name).is_relative_to(path) or Path(name).is_relative_to(_beside(path))
    return error.errno in _NOT_WRITABLE or (bool(name) and ours)


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{_UNFINISHED}"
