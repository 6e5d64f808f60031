"""Output folders that are whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ModelError, OutputError


def check_folder(folder: str | Path, option: str = "") -> None:
    """Raise unless there is such a folder.

    Args:
        folder: That of a saved model.
        option: What it was given by, for the message, such as `"--against"`.

    Raises:
        ModelError: there is none, or it is a file.
    """
    path, named = Path(folder), f"{option} {folder}".strip() or "''"
    if not str(folder) or not path.exists():
        raise ModelError(f"{named}: there is no such {'file' if path.suffix == '.gguf' else 'folder'}; check the path")
    if not path.is_dir():
        raise ModelError(f"{named}: is a file; name the folder of a saved model")


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Raise unless `folder` may be written: it is not there, it is empty, or it is a saved model to be overwritten.

    Raises:
        OutputError: it is a file, or it is not empty and may not be replaced.
    """
    path = Path(folder)
    if path.is_file():
        raise OutputError(f"{path}: is a file; name a folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{path}: exists and is not empty; name another folder, or pass --overwrite (overwrite=True)")
    if not (path / "config.json").is_file():
        raise OutputError(
            f"{path}: is not empty and has no config.json, so it is no saved model and is not overwritten; name "
            "another folder"
        )


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when everything within succeeded, and is removed otherwise.

    Raises:
        OutputError: as [`check_output`], or the parent folder cannot be written.
    """
    check_output(folder, overwrite)
    path = Path(folder).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error}); name another folder") from error
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        yield partial
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Make the finished folder `partial` be `path`, in place of a folder that is there."""
    if not path.is_dir():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    path.rename(old / path.name)
    partial.rename(path)
    shutil.rmtree(old)
