"""Write Jane Austen's novels as text files, a paragraph a line, from the R package janeaustenr.

Usage: make_books.py RDATA.rdb OUT. The novels are in the public domain. On Debian:

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb .
    python make_books.py usr/lib/R/site-library/janeaustenr/data/Rdata.rdb books
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

_HEADER = len(b"X\n") + 3 * 4  # format, version, writer, least reader
_STRINGS = 16  # R's type code of a vector of strings


def vectors(database: bytes) -> list[list[str]]:
    """The vectors of strings in R's lazy-load database: compressed chunks, each behind the length of its content."""
    found = []
    while database:
        inflate = zlib.decompressobj()
        found.append(strings(inflate.decompress(database[4:])))
        database = inflate.unused_data
    return found


def strings(serialized: bytes) -> list[str]:
    """R's serialized vector of strings: a header with the name of the encoding, a type, a count, and the strings."""
    (encoding_length,) = struct.unpack_from(">i", serialized, _HEADER)
    at = _HEADER + 4 + encoding_length
    kind, count = struct.unpack_from(">ii", serialized, at)
    if kind & 0xFF != _STRINGS:
        raise SystemExit(f"type {kind & 0xFF} is not a vector of strings; pass the package's data/Rdata.rdb")
    at += 8
    lines = []
    for _ in range(count):
        _flags, length = struct.unpack_from(">ii", serialized, at)
        lines.append(serialized[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return lines


def paragraphs(lines: list[str]) -> str:
    """Wrapped lines joined, a paragraph a line."""
    joined = "\n".join(lines).split("\n\n")
    return "\n".join(" ".join(part.split()) for part in joined if part.strip()) + "\n"


def main() -> None:
    database, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for lines in vectors(database.read_bytes()):
        title = next(line for line in lines if line.strip()).strip().lower().replace(" ", "_").replace("&", "and")
        (out / f"{title}.txt").write_text(paragraphs(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
