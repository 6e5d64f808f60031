"""Where calibration text comes from: files, lists, data sets in memory and on the Hub, and the text shipped here."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CalibrationError, first_line, shorten, without

SAMPLE = "sample"
SOURCES = (
    "a text file, the name of a data set ('wikitext2', 'c4', or any id on the Hub), or 'sample', the text that is "
    "shipped with this package for a first try"
)

_SAMPLE_FILE = Path(__file__).with_name("sample.txt.gz")
_LONGEST_NAME = 255  # bytes that file systems allow a file's name
_TEXT_ENDINGS = {"txt", "text", "raw", "md", "rst", "json", "jsonl", "csv", "tsv", "parquet", "html", "xml", "py", "gz"}
_TOKEN_COLUMN = "input_ids"  # what tokenizers call their output

NAMED_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
"""Short names of the data sets that the literature calibrates on -> arguments of `datasets.load_dataset`."""


class DatasetName(NamedTuple):
    """A data set on the Hub: its id, and the configuration and revision of it, if named."""

    path: str
    config_name: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> DatasetName:
        """From `ID[:CONFIGURATION][@REVISION]`.

        >>> DatasetName.parse("Salesforce/wikitext:wikitext-2-raw-v1@main")
        DatasetName(path='Salesforce/wikitext', config_name='wikitext-2-raw-v1', revision='main')
        """
        rest, _, revision = name.partition("@")
        path, _, config_name = rest.partition(":")
        return cls(path, config_name or None, revision or None)


def dataset_id(name: str) -> str | None:
    """The id on the Hub of a data set as `calibration` names it; None for the text shipped here, and for a file's name.

    >>> dataset_id("c4@main"), dataset_id("me/data.v1:plain"), dataset_id("text.txt"), dataset_id("sample")
    ('allenai/c4', 'me/data.v1', None, None)
    """
    path = DatasetName.parse(name).path
    if path in NAMED_DATASETS:
        return NAMED_DATASETS[path]["path"]
    return None if name == SAMPLE or _is_named_like_a_file(name) else path


def documents(
    source: Any,
    split: str | None = None,
    text_column: str | None = None,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    argument: str = "calibration",
) -> Sequence[str] | Column:
    """The texts of a calibration source, or the token ids of a data set that holds them.

    Args:
        source: Path of a text file (one document), `"sample"`, name of a data set, a list of texts, or a data set.
        split: Split of a data set from the Hub. Default: `"train"`.
        text_column: Column of a data set. Default: `"input_ids"` where there is one, else `"text"`.
        config_name: Configuration of a data set from the Hub whose name says none.
        revision: Likewise its branch, tag or commit.
        token: For a data set on the Hub that is private or gated.
        argument: What the caller calls the source, for messages.

    Raises:
        CalibrationError: the source is of an unknown kind, cannot be read, or lacks the column.
    """
    if isinstance(source, str | Path):
        if source == SAMPLE and not _is_ambiguous(source, argument):
            return [gzip.decompress(_SAMPLE_FILE.read_bytes()).decode("utf-8")]
        if _is_file_name(source, argument):
            return [_read(Path(source), argument)]
        name = str(source)
        found = _load_dataset(name, split or "train", config_name, revision, token, argument)
        return Column.of(found, text_column, name)
    if hasattr(source, "column_names"):
        return Column.of(source, text_column, type(source).__name__)
    if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        return source
    raise CalibrationError(
        f"{argument}={shorten(source)} is of no kind known here; pass a text file, the name of a data set, a list of "
        "texts, token ids, a datasets.Dataset, or a mapping of names to shares"
    )


class Column:
    """One column of a data set, in order, checked as it is read: texts, or rows of token ids.

    Attributes:
        holds_ids: Whether it is token ids. What an attention mask beside them leaves out, as padding, is not read.
    """

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        columns = dataset.column_names
        if columns is not None and column not in columns:
            raise CalibrationError(f"{name}: has no column {column!r}, only {list(columns)}; pass text_column=")
        self.dataset, self.column, self.name = dataset, column, name
        self.holds_ids = column == _TOKEN_COLUMN

    @classmethod
    def of(cls, dataset: Any, column: str | None, name: str) -> Column:
        """The column asked for, or that of token ids if there is one, or that of texts."""
        return cls(dataset, column or (_TOKEN_COLUMN if is_tokenised(dataset) else "text"), name)

    def __iter__(self) -> Iterator[Any]:
        for row in self.dataset:
            yield self._ids(row) if self.holds_ids else self._text(row)

    def _text(self, row: Any) -> str:
        text = row[self.column]
        if not isinstance(text, str):
            raise CalibrationError(
                f"{self.name}: column {self.column!r} holds {type(text).__name__}, not text; pass text_column="
            )
        return text

    def _ids(self, row: Any) -> list[int]:
        ids = _plain(row[self.column])
        if not isinstance(ids, list) or not all(isinstance(item, int) for item in ids):
            raise CalibrationError(
                f"{self.name}: column {self.column!r} holds no lists of token ids; pass text_column="
            )
        mask = row.get("attention_mask")
        return ids if mask is None else [item for item, seen in zip(ids, _plain(mask), strict=True) if seen]

    def select_from(self, start: int) -> Column:
        """The same from row `start` on, then what is before it."""
        order = [*range(start, len(self.dataset)), *range(start)]
        return Column(self.dataset.select(order), self.column, self.name)

    def __len__(self) -> int:
        try:
            return len(self.dataset)
        except TypeError:  # a streamed data set
            return 0


def is_tokenised(source: Any) -> bool:
    """Whether `source` is a data set with a column of token ids."""
    return _TOKEN_COLUMN in (getattr(source, "column_names", None) or ())


def _plain(values: Any) -> Any:
    """Values of a row as a list, whatever format the data set gives them in."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_file_name(source: str | Path, argument: str) -> bool:
    path = Path(source)
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in path.parts), default=0)
    if longest > _LONGEST_NAME or len(str(source)) > 1024 or "\n" in str(source):
        raise CalibrationError(
            f"{argument}={shorten(source)}: a single string is the name of a file or of a data set; pass a text as "
            "[text]"
        )
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # such as a folder on the way that may not be searched
        raise CalibrationError(
            f"{argument}={str(source)!r} cannot be looked at: {first_line(error)}; check the path and its permissions"
        ) from error
    if str(source) in NAMED_DATASETS and not isinstance(source, Path):
        return _is_ambiguous(source, argument)
    if is_file:
        return True
    if is_folder:
        raise CalibrationError(f"{argument}={str(source)!r} is a folder; pass a text file in it, or a data set's name")
    if isinstance(source, Path) or _is_named_like_a_file(source):
        raise CalibrationError(f"{argument}={str(source)!r}: there is no such file; check the path")
    return False


def _is_ambiguous(name: str | Path, argument: str) -> bool:
    """False; it is an error that a file here has the name of something known, and not to be told which is meant."""
    if Path(name).is_file():
        raise CalibrationError(
            f"{argument}={name!r} is a name known here and that of a file in this folder; write './{name}' for the "
            "file, or rename it"
        )
    return False


def _is_named_like_a_file(name: str) -> bool:
    """Whether a name is a path, or has an ending that a data set's id would not have."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    ending = Path(DatasetName.parse(name).path).suffix[1:]
    if "/" in name:  # an id may have a dot
        return ending.lower() in _TEXT_ENDINGS
    return ending != "" and not ending[0].isdigit()


def _read(path: Path, argument: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{argument}={str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _load_dataset(
    name: str, split: str, config_name: str | None, revision: str | None, token: str | None, argument: str
) -> Any:
    import datasets

    asked = DatasetName.parse(name)
    wanted_name = asked.config_name or config_name
    if wanted_name and asked.path in NAMED_DATASETS:
        raise CalibrationError(
            f"{argument}={name!r} with the configuration {wanted_name!r}: {asked.path!r} stands for one part of a "
            f"data set; name another by its id, '{NAMED_DATASETS[asked.path]['path']}:{wanted_name}'"
        )
    arguments = dict(NAMED_DATASETS.get(asked.path, {"path": asked.path, "name": wanted_name}))
    files = arguments.get("data_files", {})
    wanted = {part: file for part, file in files.items() if part == split.partition("[")[0]}
    arguments |= {"data_files": wanted or files or None, "revision": asked.revision or revision, "token": token}
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return datasets.load_dataset(**given, split=split)
    except Exception as error:  # the client raises some twenty kinds; each means the same here
        raise CalibrationError(
            f"{argument}={name!r} with split={split!r} is no file, and could not be loaded as a data set: "
            f"{without(token, first_line(error))}; pass the path of a text file, or check the name and the connection"
        ) from without(token, error)
