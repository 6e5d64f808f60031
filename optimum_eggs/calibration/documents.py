"""Where calibration text comes from: files, lists, data sets in memory and on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, first_line, shorten

_LONGEST_NAME = 255  # bytes that file systems allow a file's name

NAMED_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
}
"""Short names of the data sets that the literature calibrates on -> arguments of `datasets.load_dataset`."""


def documents(source: Any, split: str | None = None, text_column: str | None = None) -> Sequence[str] | Iterable[str]:
    """The texts of a calibration source.

    `source`: path of a text file (one document), name of a data set, a list of texts, or a data set. A sequence, when
    the source's length is known.

    Raises:
        CalibrationError: the source is of an unknown kind, cannot be read, or lacks the column.
    """
    if isinstance(source, str | Path):
        if _is_file_name(source):
            return [_read(Path(source))]
        return _Column(_load_dataset(str(source), split or "train"), text_column or "text", str(source))
    if hasattr(source, "column_names"):
        return _Column(source, text_column or "text", type(source).__name__)
    if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        return source
    raise CalibrationError(
        f"calibration={shorten(source)} is of no kind known here; pass a text file, the name of a data set, a list of "
        "texts, token ids, a datasets.Dataset, or a mapping of names to shares"
    )


class _Column:
    """One text column of a data set, in order, checked as it is read."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        columns = dataset.column_names
        if columns is not None and column not in columns:
            raise CalibrationError(f"{name}: has no column {column!r}, only {list(columns)}; pass text_column=")
        self.dataset, self.column, self.name = dataset, column, name

    def __iter__(self) -> Iterator[str]:
        for row in self.dataset:
            text = row[self.column]
            if not isinstance(text, str):
                raise CalibrationError(
                    f"{self.name}: column {self.column!r} holds {type(text).__name__}, not text; pass text_column="
                )
            yield text

    def select_from(self, start: int) -> Iterator[str]:
        """The texts from row `start` on, then those before it."""
        order = [*range(start, len(self.dataset)), *range(start)]
        yield from _Column(self.dataset.select(order), self.column, self.name)

    def __len__(self) -> int:
        try:
            return len(self.dataset)
        except TypeError:  # a streamed data set
            return 0


def rotated(texts: Iterable[str], start: int) -> Iterator[str]:
    """`texts` from number `start` on, then those before it."""
    if isinstance(texts, _Column):
        return texts.select_from(start)
    listed = list(texts)
    return iter(listed[start:] + listed[:start])


def _is_file_name(source: str | Path) -> bool:
    path = Path(source)
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in path.parts), default=0)
    if longest > _LONGEST_NAME or len(str(source)) > 1024 or "\n" in str(source):
        raise CalibrationError(
            f"calibration={shorten(source)}: a single string is the name of a file or of a data set; pass a text as "
            "[text]"
        )
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # such as a folder on the way that may not be searched
        raise CalibrationError(
            f"calibration={str(source)!r} cannot be looked at: {first_line(error)}; check the path and its permissions"
        ) from error
    if is_file:
        return True
    if is_folder:
        raise CalibrationError(f"calibration={str(source)!r} is a folder; pass a text file in it, or a data set's name")
    known = str(source) in NAMED_DATASETS
    ending = path.suffix[1:]
    named_like_file = ending != "" and not ending[0].isdigit()  # a data set's version is no ending
    looks_like_path = isinstance(source, Path) or named_like_file or str(source).startswith((".", "/", "~"))
    if not known and looks_like_path:
        raise CalibrationError(f"calibration={str(source)!r}: there is no such file; check the path")
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration={str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _load_dataset(name: str, split: str) -> Any:
    import datasets

    arguments = NAMED_DATASETS.get(name, {"path": name})
    try:
        return datasets.load_dataset(**arguments, split=split)
    except Exception as error:  # the client raises some twenty kinds; each means the same here
        raise CalibrationError(
            f"calibration={name!r} with split={split!r} is no file, and could not be loaded as a data set: "
            f"{first_line(error)}; pass the path of a text file, or check the name and the connection"
        ) from error
