"""Names of models and texts as others may know them: a report is published, and paths of one machine are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub_id(name: Any) -> str | None:
    """`name` if it names something on the Hub, None if it is a path or nothing.

    >>> hub_id("org/model"), hub_id("./model"), hub_id("a/b/c"), hub_id(None)
    ('org/model', None, None, None)
    """
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
        return None
    return None if Path(name).exists() else name


def public_name(source: Any) -> Any:
    """A file or folder by its name without folders, any other name as it is; data held in memory has none.

    A path is one also when what it named is gone. A name without an ending keeps a `./`, since it would be a data set's
    or a model's without.

    >>> public_name(__file__), public_name("wikitext2"), public_name({"c4": 1.0}), public_name([1, 2])
    ('names.py', 'wikitext2', {'c4': 1.0}, None)
    >>> public_name("/home/me/gone.txt"), public_name("./c4")
    ('gone.txt', './c4')
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not (path.exists() or path.is_absolute() or str(source).startswith((".", "~"))):
            return str(source)
        return path.name if path.suffix else f"./{path.name}"
    if isinstance(source, Mapping):
        return {public_name(name): share for name, share in source.items()}
    return None
