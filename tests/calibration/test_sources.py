"""What a calibration source may be besides plain text, and what is said of one that cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import datasets
import pytest
import tiny
import torch

from optimum_eggs.calibration import token_windows
from optimum_eggs.calibration.documents import described, documents, refuse_twice
from optimum_eggs.cli.prune import parse_sources
from optimum_eggs.errors import CalibrationError, ConfigError
from optimum_eggs.names import public_name

TEXTS = [tiny.make_text(40, seed) for seed in range(20)] + ["", "NA", "{not json"]


def write_rows(folder, name, rows):
    """A file of rows, of the kind that its ending says."""
    path = folder / name
    opened = gzip.open if name.endswith(".gz") else open
    kind = name.removesuffix(".gz").rpartition(".")[2]
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            table.to_pandas().to_csv(file, sep="\t" if kind == "tsv" else ",", index=False)
    return path


def draw(source, tokenizer, **options):
    return token_windows(source, tokenizer, num_samples=4, seq_len=8, **options).ids


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    "ending", ["json", "jsonl", "csv", "tsv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "tsv.gz"]
)
def test_files_of_rows_are_read_as_rows(ending, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = write_rows(tmp_path, f"some[1].{ending}", [{"n": i, "body": text} for i, text in enumerate(TEXTS)])
    assert list(documents(str(path))) == TEXTS
    for sampling in ("sequential", "random"):
        assert torch.equal(draw(path, tokenizer, sampling=sampling), draw(TEXTS, tokenizer, sampling=sampling))
    assert not cache.exists()
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_the_column_of_a_file_of_rows(tokenizer, tmp_path):
    several = write_rows(tmp_path, "several.jsonl", [{"title": "a", "body": text, "n": 1} for text in TEXTS])
    with pytest.raises(
        CalibrationError, match=r"text='.*several.jsonl' has the columns of texts \['title', 'body'\]; n"
    ):
        documents(several, argument="text")
    assert list(documents(several, text_column="body")) == TEXTS
    usual = write_rows(tmp_path, "usual.csv", [{"title": "a", "text": text} for text in TEXTS])
    assert list(documents(usual)) == TEXTS
    none = write_rows(tmp_path, "none.jsonl", [{"n": 1}])
    with pytest.raises(CalibrationError, match=r"has no column of texts, only \['n'\]; name one with text_column="):
        documents(none)
    with pytest.raises(CalibrationError, match=r"train='.*none.jsonl' has no column 'body', only \['n'\]; name one"):
        documents(none, text_column="body", argument="train")
    rows = [list(range(i, i + 8)) for i in range(10)]
    ids = write_rows(tmp_path, "ids.jsonl", [{"input_ids": row, "text": "unused"} for row in rows])
    assert draw(ids, tokenizer, sampling="sequential").tolist() == rows[:4]


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", "no { json"), ("a.parquet", "zz"), ("a.json", ""), ("a.csv", "")]
)
def test_a_file_of_rows_that_is_damaged(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=rf"text='.*{name}' (cannot be read as|is empty)"):
        documents(tmp_path / name, argument="text")


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.txt", "train='https://example.org/a.txt': a URL is not read; download it"),
        ("s3://bucket/a.txt", "a URL is not read"),
        ("-", "train='-': standard input is not read, .*; save it to a file"),
        ("", "train='' is empty; name a text file"),
        ("no.txt", "train='no.txt': there is no such file"),
        ("me/no-such-data", "train='me/no-such-data' with split='train' is no file, and could not be loaded"),
        (3.5, "train=3.5 is of no kind known here"),
    ],
)
def test_what_cannot_be_read_is_called_what_it_is(source, message, monkeypatch):
    def load_dataset(**arguments):
        assert "://" not in arguments["path"]
        raise ConnectionError("no way through")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=message):
        documents(source, argument="train")


def test_splits_of_a_data_set_are_no_shares(tokenizer):
    part = datasets.Dataset.from_dict({"text": TEXTS})
    splits = datasets.DatasetDict({"train": part, "test": part})
    message = (
        r"a DatasetDict of the splits \['train', 'test'\] is not one data set; pass one of them, such as data\['tr"
    )
    for argument, read in (("calibration", lambda data: draw(data, tokenizer)), ("text", None)):
        with pytest.raises(CalibrationError, match=f"{argument}: {message}"):
            read(splits) if read else documents(splits, argument=argument)
    with pytest.raises(CalibrationError, match="a dict of the splits"):
        draw({"train": part}, tokenizer)


def test_one_text_by_two_paths_is_given_twice(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXTS[0] * 9)
    Path("b.txt").write_text(TEXTS[0] * 9)
    Path("link.txt").symlink_to("a.txt")
    refuse_twice(["a.txt", "b.txt", "c4", [1, 2], [1, 2]], "train")
    for other in ("a.txt", "./a.txt", str(Path("a.txt").absolute()), "link.txt"):
        with pytest.raises(ConfigError, match=r"train='.*' is given twice"):
            refuse_twice(["a.txt", "b.txt", other], "train")
        with pytest.raises(ConfigError, match=r"calibration='.*' is given twice"):
            parse_sources(["a.txt=2", other])
    with pytest.raises(ConfigError, match=r"calibration='./a.txt' is given twice, as 'a.txt' too; give it once"):
        draw({"a.txt": 1, "./a.txt": 1}, tokenizer)


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf"), 10**400])
def test_a_share_is_a_positive_number(share, tokenizer):
    with pytest.raises(CalibrationError, match=r"the share .* of 'sample' is not a positive number"):
        draw({"sample": share}, tokenizer)
    if not isinstance(share, int) or share < 1:
        for more in ([], ["c4"]):
            with pytest.raises(CalibrationError, match=r"the share .* of 'sample' is not a positive number"):
                parse_sources([f"sample={share}", *more])


def test_a_share_that_is_too_small_for_a_window_is_not_passed_over(tokenizer, text_file):
    with pytest.raises(
        CalibrationError, match=r"the share 0.01 of 'sample' is too small for one of 4 windows; give it m"
    ):
        draw({text_file: 1, "sample": 0.01}, tokenizer)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("en", "de", "de/x"):
        Path(folder).mkdir()
        Path(folder, "part.txt").touch()
    assert public_name({"en/part.txt": 1, "de/part.txt": 2, "c4": 3}) == {"en/part.txt": 1, "de/part.txt": 2, "c4": 3}
    deep = {tmp_path / "de" / "part.txt": 1, "de/x/part.txt": 2, "other.txt": 3}
    assert public_name(deep) == {"de/part.txt": 1, "x/part.txt": 2, "other.txt": 3}
    assert public_name({"/one/part": 1, "/two/part": 2}) == {"./one/part": 1, "./two/part": 2}
    assert str(tmp_path) not in str(public_name({tmp_path / "en/part.txt": 1, tmp_path / "de/part.txt": 1}))


def test_a_text_is_described_by_its_name_and_its_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert described([tmp_path / "a.txt", "c4", "sample", ["in memory"]], "validation") == [
        {"name": "a.txt", "split": None, "sha256": sha},
        {"name": "c4", "split": "validation", "sha256": None},
        {"name": "sample", "split": None, "sha256": None},
    ]
