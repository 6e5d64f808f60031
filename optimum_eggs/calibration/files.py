"""Files of text, plain or of rows, gzipped or not: how they are read, and what is said of those that cannot be."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..access import no_file
from ..errors import first_line
from ..logs import silent

_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "csv": ("csv", {"keep_default_na": False}),  # else a cell of "NA" or of nothing is no text
    "tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    "parquet": ("parquet", {}),
}
"""Endings of files that hold rows -> which of `datasets.Dataset`'s readers takes them, and how."""
ROWS_ENDINGS = ", ".join(f".{ending}" for ending in _ROWS)

_PARQUET = b"PAR1"
_UTF16 = ("it is UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`")
_UTF32 = ("it is UTF-32", "convert it with `iconv -f UTF-32 -t UTF-8`")
_BEGINNINGS: dict[bytes, tuple[str, str]] = {
    codecs.BOM_UTF32_LE: _UTF32,  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: _UTF32,
    codecs.BOM_UTF16_LE: _UTF16,
    codecs.BOM_UTF16_BE: _UTF16,
    b"\x1f\x8b": ("it is gzipped", "give it the ending .gz, or gunzip it"),
    b"BZh": ("it is compressed by bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("it is compressed by xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("it is compressed by zstd", "unpack it with unzstd"),
    _PARQUET: ("it is a parquet file", "give it the ending .parquet"),
    b"PK\x03\x04": ("it is a zip archive, or a document that is one inside", "unpack it, or save its text to a file"),
    b"%PDF": ("it is a PDF", "save its text to a file"),
}
"""How files begin that are taken for UTF-8 text -> what they are, and what to do."""
_MEND = "mend it, or give it the ending of what it is, such as .txt for plain text"
TO_UTF8 = "convert it to UTF-8, such as with `iconv -f LATIN1 -t UTF-8`, or give a text file"
_DISK = "check the file and its disk"


class UnusableError(Exception):
    """Why a source cannot be used: what is said behind its name."""


def check_file(path: Path, kind: str) -> None:
    """Raise unless something of this kind, as `access.kind` tells it, is a file that is not blank.

    Raises:
        UnusableError: it is not.
    """
    if kind == "folder":
        raise UnusableError(" is a folder; pass a text file in it, or a data set's name")
    if kind == "link":
        raise UnusableError(f": {no_file(path)}")
    if kind != "file":
        raise UnusableError(
            f" is a {kind}, which is not read, since a run must find the same text again; save it to a file"
        )
    if not any(chunk.strip() for chunk in _unpacked(path)):
        raise UnusableError(" is empty, or holds nothing but white space; give a file with text in it")


def is_blank(text: str) -> bool:
    r"""Whether nothing of a text can be seen.

    >>> is_blank(" \n"), is_blank("\ufeff\0"), is_blank(" .")
    (True, True, False)
    """
    return not any(character.isprintable() and not character.isspace() for character in text)


def read_text(path: Path) -> str:
    """The text of a plain file.

    Raises:
        UnusableError: it cannot be read, is not UTF-8, or is blank.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(b"".join(_unpacked(path))), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        what, remedy = _known_by_its_beginning(path) or (str(error), TO_UTF8)
        raise UnusableError(f" cannot be read as UTF-8 text: {what}; {remedy}") from error
    if is_blank(text):
        raise UnusableError(" holds no character that can be seen; give a file with text in it")
    return text


def rows_kind(path: Path) -> str | None:
    """Which kind of rows a file holds, by its ending; None for plain text.

    >>> rows_kind(Path("a.jsonl")), rows_kind(Path("a.csv.gz")), rows_kind(Path("a.txt.gz"))
    ('jsonl', 'csv', None)
    """
    name = path.with_suffix("") if _is_gzipped(path) else path
    kind = name.suffix[1:].lower()
    return kind if kind in _ROWS else None


def read_rows(path: Path, kind: str) -> Any:
    """The rows of a file of this kind, as a `datasets.Dataset`.

    Raises:
        UnusableError: it cannot be read, or has no rows; or there is no room for temporary files.
    """
    import datasets

    reader, options = _ROWS[kind]
    read = getattr(datasets.Dataset, f"from_{reader}")
    try:
        with tempfile.TemporaryDirectory() as cache:  # the user's own may be read-only, and is not for every text
            plain = path
            if _is_gzipped(path):
                plain = Path(cache) / "rows"
                with plain.open("wb") as unpacked:
                    unpacked.writelines(_unpacked(path))
            try:
                with silent("datasets"):
                    # What is read is mapped from a file of the cache, which stays until it is let go, nameless.
                    return read(glob.escape(str(plain)), cache_dir=cache, **options)
            except Exception as error:  # pyarrow, pandas and datasets raise some ten kinds; each means the same here
                raise UnusableError(_why_no_rows(path, kind, error)) from error
    except OSError as error:
        raise UnusableError(
            f" cannot be read without temporary files, which cannot be written ({first_line(error)}); make room for "
            "them, or name another folder for them by TMPDIR"
        ) from error


def _why_no_rows(path: Path, kind: str, error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # datasets says less
    if "corresponds to no data" in str(cause):
        header = " below the first line, which names the columns" if kind in ("csv", "tsv") else ""
        return f" has no rows{header}; give a file with some"
    known = _known_by_its_beginning(path)
    if known is not None and not (kind == "parquet" and known == _BEGINNINGS[_PARQUET]):
        said, remedy = known
    elif isinstance(cause, UnicodeDecodeError):
        said, remedy = str(cause), TO_UTF8
    elif isinstance(cause, OSError):
        said, remedy = first_line(cause), f"{_DISK}, and the room for temporary files"
    else:
        broken = _broken_line(path) if kind == "jsonl" else None
        said, remedy = broken or (first_line(cause).rstrip(".!"), _MEND)
    return f" cannot be read as {kind}: {said}; {remedy}"


def _broken_line(path: Path) -> tuple[str, str] | None:
    """The first line of a file that is not JSON, and why, and what to do with it; None if all are."""
    for number, line in enumerate(_unpacked(path, by_line=True), 1):
        try:
            json.loads(line.strip() or b"0")
        except json.JSONDecodeError as error:
            return f"line {number} is no JSON ({error.msg}: column {error.colno})", _MEND
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 ({error})", TO_UTF8
        except (ValueError, RecursionError) as error:
            return f"line {number} is no JSON ({first_line(error)})", _MEND
    return None


def _known_by_its_beginning(path: Path) -> tuple[str, str] | None:
    """What a file is that is no UTF-8 text, and what to do with it, if that can be told."""
    start = next(_unpacked(path), b"")
    return next((found for beginning, found in _BEGINNINGS.items() if start.startswith(beginning)), None)


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _unpacked(path: Path, by_line: bool = False) -> Iterator[bytes]:
    """The bytes of a file in chunks or in lines, unpacked if its ending says that it is gzipped.

    Raises:
        UnusableError: they cannot be read.
    """
    try:
        with gzip.open(path) if _is_gzipped(path) else path.open("rb") as file:
            yield from file if by_line else iter(lambda: file.read(1 << 16), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnusableError(
            f" cannot be unpacked as gzip: {first_line(error).rstrip('.')}; pack it anew, or take .gz off its name if "
            "it is not gzipped"
        ) from error
    except OSError as error:
        raise UnusableError(f" cannot be read: {first_line(error)}; {_DISK}") from error
