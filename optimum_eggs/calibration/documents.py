"""Where calibration text comes from: files, lists, data sets in memory and on the Hub, and the text shipped here."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..access import closed, kind, no_utf8
from ..errors import CalibrationError, ConfigError, first_line, shorten, without
from ..files import sha256
from ..names import TEXT_ENDINGS, public_names
from .files import (
    ROWS_ENDINGS,
    TO_UTF8,
    UnusableError,
    check_file,
    is_blank,
    read_rows,
    read_text,
    rows_kind,
)

SAMPLE = "sample"
SOURCES = (
    "a text file, the name of a data set ('wikitext2', 'c4', or any id on the Hub), a file of rows (.jsonl, .json, "
    ".csv, .tsv, .parquet), or 'sample', the text that is shipped with this package for a first try"
)

_SAMPLE_FILE = Path(__file__).with_name("sample.txt.gz")
_LONGEST_NAME = 255  # bytes that file systems allow a file's name
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TOKEN_COLUMN = "input_ids"  # what tokenizers call their output
_NAME_COLUMN = "text_column= (--text-column)"

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
        source: Path of a text file (one document) or of a file of rows (`.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`),
            either of them gzipped (`.gz`) or not; `"sample"`, name of a data set, a list of texts, or a data set.
        split: Split of a data set from the Hub. Default: `"train"`.
        text_column: Column of a data set or of a file of rows; plain text has none. Default: `"input_ids"` where
            there is one, else `"text"`; of a file that has neither, its one column of texts.
        config_name: Configuration of a data set from the Hub whose name says none.
        revision: Likewise its branch, tag or commit.
        token: For a data set on the Hub that is private or gated.
        argument: What the caller calls the source, for messages.

    Raises:
        CalibrationError: the source is of an unknown kind, cannot be read, is blank, or lacks the column.
    """
    called = f"{argument}={shown(source)}"
    try:
        if isinstance(source, str | Path):
            if _is_file_name(source):
                return _read(Path(source), text_column, called)
            if source == SAMPLE:
                _refuse_column(text_column)
                return [gzip.decompress(_SAMPLE_FILE.read_bytes()).decode("utf-8")]
            found = _load_dataset(str(source), split or "train", config_name, revision, token)
            return Column.of(found, text_column, called)
        refuse_splits(source, argument)
        if hasattr(source, "column_names"):
            return Column.of(source, text_column, f"{argument}={type(source).__name__}")
        if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
            if source and all(map(is_blank, source)):
                raise UnusableError(" holds no character that can be seen; pass texts that are not blank")
            return source
        raise UnusableError(
            " is of no kind known here; pass a text file, the name of a data set, a list of texts, token ids, a "
            "datasets.Dataset, or a mapping of names to shares"
        )
    except UnusableError as error:
        raise CalibrationError(f"{called}{error}") from error.__cause__


def check_name(source: Any, argument: str) -> None:
    """Raise if `source` is a name that is known to be none of a text, without a look at the Hub.

    Raises:
        CalibrationError: it is.
    """
    if isinstance(source, str | Path):
        try:
            _is_file_name(source)
        except UnusableError as error:
            raise CalibrationError(f"{argument}={shown(source)}{error}") from error.__cause__


def refuse_splits(source: Any, argument: str) -> None:
    """Raise if `source` is a mapping of splits to data sets, as `load_dataset` gives it where no split is named.

    Raises:
        CalibrationError: it is.
    """
    if isinstance(source, Mapping) and any(hasattr(part, "column_names") for part in source.values()):
        raise CalibrationError(
            f"{argument}: a {type(source).__name__} of the splits {list(source)} is not one data set; pass one of "
            f"them, such as data[{next(iter(source))!r}]"
        )


def refuse_twice(sources: Iterable[Any], argument: str) -> None:
    """Raise if two of the sources are the same file, by whatever path, or the same name.

    Raises:
        ConfigError: they are.
    """
    seen: dict[Any, Any] = {}
    for source in sources:
        identity = _identity(source)
        if identity is not None and identity in seen:
            other = str(seen[identity])
            also = "" if other == str(source) else f", as {other!r} too"
            raise ConfigError(f"{argument}={str(source)!r} is given twice{also}; give it once")
        seen[identity] = source


def _identity(source: Any) -> Any:
    """What a file has in common with itself by another path; of a name, the name; None of data in memory."""
    if not isinstance(source, str | Path):
        return None
    try:
        found = Path(source).stat()
    except (OSError, ValueError):
        return str(source)
    return found.st_dev, found.st_ino


def described(sources: Iterable[Any], split: str | None = None) -> list[dict[str, Any]]:
    """Names of texts as others may know them, by which they are known again: `name`, `split`, `sha256`.

    The SHA-256 is that of a file's bytes; only data sets on the Hub have a split. Data in memory is left out.
    """
    listed = list(sources)
    return [
        {"name": name, "split": None if digest or name == SAMPLE else split or "train", "sha256": digest}
        for name, digest in zip(public_names(listed), map(_digest, listed), strict=True)
        if name is not None
    ]


def _digest(source: Any) -> str | None:
    return sha256(Path(source)) if isinstance(source, str | Path) and Path(source).is_file() else None


class Column:
    """One column of a data set, in order, checked as it is read: texts, or rows of token ids.

    Attributes:
        holds_ids: Whether it is token ids. What an attention mask beside them leaves out, as padding, is not read.
    """

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        columns = dataset.column_names
        if columns is not None and column not in columns:
            raise CalibrationError(f"{name}: has no column {column!r}, only {list(columns)}; pass {_NAME_COLUMN}")
        self.dataset, self.column, self.name = dataset, column, name
        self.holds_ids = column == _TOKEN_COLUMN

    @classmethod
    def of(cls, dataset: Any, column: str | None, name: str) -> Column:
        """The column asked for, or that of token ids if there is one, or that of texts."""
        return cls(dataset, column or (_TOKEN_COLUMN if is_tokenised(dataset) else "text"), name)

    def __iter__(self) -> Iterator[Any]:
        return map(self._ids, self.dataset) if self.holds_ids else self._texts()

    def _texts(self) -> Iterator[str]:
        """The texts, the first of them once it is known that not all are blank."""
        texts = map(self._text, self._rows())
        first: list[str] = []
        for text in texts:
            first.append(text)
            if not is_blank(text):
                break
        else:
            what = (
                f"column {self.column!r} is blank in all of its rows ({len(first)})" if first else "there are no rows"
            )
            raise CalibrationError(f"{self.name}: {what}; give some text, or name another column with {_NAME_COLUMN}")
        yield from first
        yield from texts

    def _rows(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{self.name}: a text in it is not UTF-8 ({error}); {TO_UTF8}") from error

    def _text(self, row: Any) -> str:
        text = row[self.column]
        if text is None:
            raise CalibrationError(
                f"{self.name}: column {self.column!r} holds null where a text is wanted; leave such rows out, or "
                f"name another column with {_NAME_COLUMN}"
            )
        if not isinstance(text, str):
            raise CalibrationError(
                f"{self.name}: column {self.column!r} holds {type(text).__name__}, not text; pass {_NAME_COLUMN}"
            )
        return text

    def _ids(self, row: Any) -> list[int]:
        ids = _plain(row[self.column])
        if not isinstance(ids, list) or not all(isinstance(item, int) for item in ids):
            raise CalibrationError(
                f"{self.name}: column {self.column!r} holds no lists of token ids; pass {_NAME_COLUMN}"
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


def shown(source: Any) -> str:
    """A source in a message: a name in full, anything else in short."""
    return repr(str(source)) if isinstance(source, str | Path) and not _is_a_text(source) else shorten(source)


def _is_a_text(source: str | Path) -> bool:
    """Whether it cannot be a name."""
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in Path(source).parts), default=0)
    return longest > _LONGEST_NAME or len(str(source)) > 1024 or "\n" in str(source)


def _is_file_name(source: str | Path) -> bool:
    if source == "":
        raise UnusableError(f" is empty; name {SOURCES}")
    if source == "-":
        raise UnusableError(
            ": standard input is not read, since a run must find the same text again; save it to a file"
        )
    if _is_a_text(source):
        raise UnusableError(": a single string is the name of a file or of a data set; pass a text as [text]")
    if _URL.match(str(source)):
        raise UnusableError(": a URL is not read; download it, and name the file")
    path, why = Path(source), no_utf8(source)
    if why:
        raise UnusableError(f": {why}")
    found = kind(path)
    if source in (SAMPLE, *NAMED_DATASETS):
        if found == "file":
            raise UnusableError(
                f" is a name known here and that of a file in this folder; write './{source}' for the file, or rename "
                "it"
            )
        return False
    why = closed(path)
    if why:
        raise UnusableError(f": {why}")
    if found is not None:
        check_file(path, found)
        return True
    if isinstance(source, Path) or _is_named_like_a_file(source):
        raise UnusableError(": there is no such file; check the path")
    return False


def _is_named_like_a_file(name: str) -> bool:
    """Whether a name is a path, or has an ending that a data set's id would not have."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    ending = Path(DatasetName.parse(name).path).suffix[1:]
    if "/" in name:  # an id may have a dot
        return ending.lower() in TEXT_ENDINGS
    return ending != "" and not ending[0].isdigit()


def _read(path: Path, text_column: str | None, called: str) -> Sequence[str] | Column:
    """The text of a file, or the column of texts of one that holds rows."""
    ending = rows_kind(path)
    if ending is not None:
        rows = read_rows(path, ending)
        return Column(rows, _text_column(rows, ending, text_column, called), called)
    _refuse_column(text_column)
    return [read_text(path)]


def _refuse_column(text_column: str | None) -> None:
    """Raise if a column of plain text is asked for."""
    if text_column is not None:
        raise UnusableError(
            f" is plain text, without a column {text_column!r}; leave out {_NAME_COLUMN}, or give a file of rows "
            f"({ROWS_ENDINGS})"
        )


def columns_of(sources: Iterable[Any], text_column: str | None) -> list[str | None]:
    """The column to ask each of several sources for: those that are plain text have none, where others have it.

    Where none has columns at all, each is asked for it, and so refuses it.
    """
    having = [not _is_plain(source) for source in sources]
    return [text_column if has or not any(having) else None for has in having]


def _is_plain(source: Any) -> bool:
    """Whether a source is the text shipped here, or a file that is not of rows."""
    if not isinstance(source, str | Path):
        return False
    try:
        is_file = _is_file_name(source)
    except UnusableError:  # said when it is read
        return False
    return source == SAMPLE or (is_file and rows_kind(Path(source)) is None)


def _text_column(rows: Any, ending: str, asked: str | None, called: str) -> str:
    """The column asked for, or of token ids, or of the usual name, or the one of texts, of a file of rows."""
    names = rows.column_names
    usual = [name for name in (_TOKEN_COLUMN, "text") if name in names]
    texts = [
        name for name, type_ in rows.features.items() if getattr(type_, "dtype", None) in ("string", "large_string")
    ]
    if asked is None and (usual or len(texts) == 1):
        return (usual or texts)[0]
    if asked is not None:
        if asked in names:
            return asked
        which = f"has no column {asked!r}, only {_listed(names)}"
    else:
        which = (
            f"has the columns of texts {_listed(texts)}" if texts else f"has no column of texts, only {_listed(names)}"
        )
    header = ", as its first line calls them" if ending in ("csv", "tsv") else ""
    raise CalibrationError(f"{called} {which}{header}; name one with {_NAME_COLUMN}")


def _listed(names: Iterable[str]) -> str:
    """Names of columns in a message, each in short: a first line that is no header may be long."""
    return f"[{', '.join(map(shorten, names))}]"


def _load_dataset(name: str, split: str, config_name: str | None, revision: str | None, token: str | None) -> Any:
    import datasets

    asked = DatasetName.parse(name)
    wanted_name = asked.config_name or config_name
    if wanted_name and asked.path in NAMED_DATASETS:
        raise UnusableError(
            f" with the configuration {wanted_name!r}: {asked.path!r} stands for one part of a data set; name another "
            f"by its id, '{NAMED_DATASETS[asked.path]['path']}:{wanted_name}'"
        )
    arguments = dict(NAMED_DATASETS.get(asked.path, {"path": asked.path, "name": wanted_name}))
    files = arguments.get("data_files", {})
    wanted = {part.partition("[")[0].strip() for part in split.split("+")} if files else set()
    unknown = sorted(wanted - files.keys())
    if unknown:
        raise UnusableError(f" has no split {unknown[0]!r}, only {' and '.join(files)}; name one with split= (--split)")
    arguments |= {
        "data_files": {part: files[part] for part in sorted(wanted)} or None,
        "revision": asked.revision or revision,
        "token": token,
    }
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return datasets.load_dataset(**given, split=split)
    except Exception as error:  # the client raises some twenty kinds; each means the same here
        said = without(token, first_line(error)).rstrip(".")
        raise UnusableError(
            f" with split={split!r} is no file, and could not be loaded as a data set: {said}; pass the path of a text "
            "file, or check the name and the connection"
        ) from without(token, error)
