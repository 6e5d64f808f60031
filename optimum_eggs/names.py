"""Names of models and texts as others may know them: a report is published, and paths of one machine are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .access import is_there

TEXT_ENDINGS = {"txt", "text", "raw", "md", "rst", "json", "jsonl", "csv", "tsv", "parquet", "html", "xml", "py", "gz"}
"""Endings of names with one slash that tell a file from something on the Hub."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub_id(name: Any) -> str | None:
    """`name` if it names something on the Hub, None if it is a path or nothing.

    >>> hub_id("org/model"), hub_id("./model"), hub_id("a/b/c"), hub_id(None)
    ('org/model', None, None, None)
    """
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
        return None
    return None if is_there(name) else name


def public_name(source: Any) -> Any:
    """A file or folder by its name without folders, any other name as it is; data held in memory has none.

    A path is one also when what it named is gone. A name without an ending keeps a `./`, since it would be a data set's
    or a model's without.

    >>> public_name(__file__), public_name("wikitext2"), public_name({"c4": 1.0}), public_name([1, 2])
    ('names.py', 'wikitext2', {'c4': 1.0}, None)
    >>> public_name("/home/me/gone.txt"), public_name("./c4")
    ('gone.txt', './c4')
    """
    if isinstance(source, Mapping):
        return dict(zip(public_names(list(source)), source.values(), strict=True))
    if isinstance(source, str | Path):
        return _tail(Path(source), 1) if _is_path(source) else str(source)
    return None


def public_names(sources: Sequence[Any]) -> list[Any]:
    """Each by its public name; files of one name with as many folders before it as tell them apart.

    >>> public_names(["/data/en/part.txt", "/data/de/part.txt", "/data/other.txt", "c4"])
    ['en/part.txt', 'de/part.txt', 'other.txt', 'c4']
    """
    names = [public_name(source) for source in sources]
    paths = {index: Path(source).absolute() for index, source in enumerate(sources) if _is_path(source)}
    for parts in range(2, max((len(path.parts) for path in paths.values()), default=0)):
        alike = [index for index in paths if names.count(names[index]) > 1]
        names = [_tail(paths[index], parts) if index in alike else name for index, name in enumerate(names)]
    return names


def _is_path(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    return is_there(path) or path.is_absolute() or str(source).startswith((".", "~"))


def _tail(path: Path, parts: int) -> str:
    """The last parts of a path, never its root; with a `./` where it could be taken for something on the Hub."""
    kept = [part for part in path.parts if part != path.anchor][-parts:]
    clear = path.suffix[1:].lower() in TEXT_ENDINGS if len(kept) == 2 else bool(path.suffix)
    return "/".join(kept) if clear else "./" + "/".join(kept)
