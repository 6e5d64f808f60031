"""Files of text that hold nothing, are no files, or cannot be read: each is called what it is, with what to do."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tempfile
from pathlib import Path

import datasets
import pytest
import tiny
import torch

from optimum_eggs.calibration import token_windows
from optimum_eggs.calibration.documents import documents
from optimum_eggs.errors import CalibrationError
from optimum_eggs.evaluation.windows import evaluation_windows
from optimum_eggs.recovery.recover import RecoverySettings
from optimum_eggs.recovery.windows import training_windows

TEXT = tiny.make_text(400)
PACKED = gzip.compress(TEXT.encode(), mtime=0)
BLANK = ["", " \t\n", "\N{ZERO WIDTH NO-BREAK SPACE}\0"]


def calibrate(source, tokenizer, **options):
    return token_windows(source, tokenizer, num_samples=4, seq_len=8, **options).ids


def judge(source, tokenizer, **options):
    return evaluation_windows(source, tokenizer, 8, **options)


def train(source, tokenizer, **options):
    return torch.cat(training_windows(RecoverySettings([source], seq_len=8, **options), tokenizer))


WAYS = [pytest.param(calibrate, id="calibration"), pytest.param(judge, id="text"), pytest.param(train, id="train")]


@pytest.fixture
def _no_hub(monkeypatch):
    def load_dataset(**arguments):
        raise AssertionError(f"{arguments} was looked for on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that one is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content):
    path = Path(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", BLANK)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_that_are_all_blank_are_no_text(way, value, ending, tokenizer, here):
    table = datasets.Dataset.from_dict({"n": [1] * 900, "body": [value] * 900})
    if ending == "parquet":
        table.to_parquet("rows.parquet")
    elif ending.startswith("json"):
        table.to_json("rows." + ending, lines=ending == "jsonl")
    else:
        # By hand, for Python 3.10 writes no null byte into a table.
        sep = "\t" if ending == "tsv" else ","
        Path("rows." + ending).write_text(f"n{sep}body\n" + f'1{sep}"{value}"\n' * 900, encoding="utf-8", newline="")
    message = r"='rows\.\w+': column 'body' is blank in all of its rows \(900\); give some text, or name another column"
    with pytest.raises(CalibrationError, match=message):
        way("rows." + ending, tokenizer, text_column="body")


def test_a_data_set_or_a_list_that_is_blank_is_no_text(tokenizer):
    blank = datasets.Dataset.from_dict({"text": ["", " "] * 500})
    for source in (blank, blank.to_iterable_dataset()):
        with pytest.raises(
            CalibrationError, match=r"calibration=\w+: column 'text' is blank in all of its rows \(1000"
        ):
            calibrate(source, tokenizer, sampling="sequential")
    with pytest.raises(CalibrationError, match=r"calibration=.* holds no character that can be seen; pass texts that"):
        calibrate(["", "\n"] * 500, tokenizer)


def test_blank_rows_beside_others_are_read_as_they_are(tokenizer):
    rows = ["", "\n", TEXT, "", TEXT]
    assert list(documents(datasets.Dataset.from_dict({"text": rows}))) == rows


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", BLANK)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a"])
def test_a_plain_file_that_is_blank_is_no_text(way, value, name, tokenizer, here):
    content = (value * 2000).encode()
    write(name, gzip.compress(content) if name.endswith(".gz") else content)
    message = rf"='\./{name}' (is empty, or holds nothing but white space|holds no character .*seen); give a file with "
    with pytest.raises(CalibrationError, match=message):
        way(f"./{name}", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "\n\n", " is empty, or holds nothing but white space; give a file with text in it"),
        ("a.csv", "\n\n", " is empty, or holds nothing but white space; give a file with text in it"),
        (
            "a.jsonl.gz",
            gzip.compress(b"", mtime=0),
            " is empty, or holds nothing but white space; give a file with text in it",
        ),
        ("a.json", "[]", " has no rows; give a file with some"),
        # pandas 3 counts within the field, pandas 2 within the file
        ("a.csv", "text\n", " has no rows below the first line, which names the columns; give a file with some"),
        ("a.jsonl", lines(*[{"text": None}] * 9), ": column 'text' holds null where a text is wanted; leave such rows"),
        ("a.jsonl", lines({"text": "b"}, {"text": None}), ": column 'text' holds null where a text is wanted; leave"),
        ("a.jsonl", lines({"text": 1}), r": column 'text' holds int, not text; pass text_column= \(--text-column\)"),
        ("a.jsonl", lines({"text": {"b": "c"}}), r": column 'text' holds dict, not text; pass text_column= \(--text-"),
        ("a.jsonl", lines({"text": ["b", "c"]}), r": column 'text' holds list, not text; pass text_column= \(--text-"),
        ("a.csv", "a b,c d\n" * 9, r" has the columns of texts \['a b', 'c d'\], as its first line calls them; name "),
        ("a.csv", f"{TEXT},a\n" * 9, r" has the columns of texts \['[a-j ]{56}\.\.\., 'a'\], as its first line calls"),
        ("a.jsonl", lines({"text": TEXT}) * 2 + '{"text": "b\n', r" cannot be read as jsonl: line 3 is no JSON \(Unte"),
        (
            "a.jsonl",
            "a text",
            r" cannot be read as jsonl: line 1 is no JSON \(Expecting value: column 1\); mend it, or",
        ),
        (
            "a.csv",
            "a,b\n1,2\n3,4,5\n",
            " cannot be read as csv: .*Expected 2 fields in line 3, saw 3; mend it, or give",
        ),
        (
            "a.parquet",
            "a text",
            " cannot be read as parquet: .*; mend it, or give it the ending of what it is, such as",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_told_why(name, content, message, tokenizer, here):
    with pytest.raises(CalibrationError, match=rf"text='{name}'{message}") as raised:
        judge(str(write(name, content)), tokenizer)
    assert ".;" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_rows_has_none(tokenizer, here):
    datasets.Dataset.from_dict({"text": []}).to_parquet("a.parquet")
    with pytest.raises(CalibrationError, match=r"text='a\.parquet' has no rows; give a file with some"):
        judge("a.parquet", tokenizer)


@pytest.mark.slow
def test_a_damaged_file_of_rows_is_one_line_on_stderr(forks, packed_folder, here):
    files = {"a.jsonl": '{"text": "b\n', "a.csv": "a,b\n1,2\n3,4,5\n", "a.parquet": "a text"}
    for name, content in files.items():
        write(name, content)
    script = (
        "import sys; from optimum_eggs.cli.main import main\n"
        "for name in sys.argv[2:]: assert main(['evaluate', sys.argv[1], '--text', name]) == 2"
    )
    done = forks.run("-c", script, packed_folder, *files, cwd=here)
    assert (done.returncode, done.stdout) == (0, "")
    for name, line in zip(files, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"error: text='{name}' (--text) cannot be read as ")


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_there_and_is_no_file_is_called_what_it_is(way, tokenizer, here):
    Path("a").mkdir()
    os.mkfifo("a/pipe")
    Path("a/link").symlink_to("nowhere")
    Path("a/loop").symlink_to("loop")
    reading, writing = os.pipe()  # as `<(...)` is in a shell
    again = "which is not read, since a run must find the same text again; save it to a file"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("a/socket")
        for name, message in (
            ("a/pipe", f" is a pipe, {again}"),
            (f"/dev/fd/{reading}", f" is a pipe, {again}"),
            ("a/socket", f" is a socket, {again}"),
            ("/dev/null", f" is a device, {again}"),
            ("a", " is a folder; pass a text file in it"),
            ("a/link", ": is a link to nowhere, which is not there; put the file there, or in the link's place"),
            ("a/loop", ": is a link to loop, which is not there; put the file there, or in the link's place"),
        ):
            with pytest.raises(CalibrationError, match=f"='{name}'{message}"):
                way(name, tokenizer)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("way", WAYS)
def test_gzipped_text_is_read_as_what_is_in_it(way, tokenizer, here):
    write("a.txt", f"{TEXT}\r\n{TEXT}")
    write("a.txt.gz", gzip.compress(Path("a.txt").read_bytes()))
    assert torch.equal(way("a.txt.gz", tokenizer), way("a.txt", tokenizer))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "content", [TEXT.encode(), PACKED[:300], PACKED[:-8] + b"12345678", PACKED[:20] + b"\xff" * 99 + PACKED[119:]]
)
def test_a_damaged_gzip_file(name, content, tokenizer, here):
    write(name, content)
    message = rf"text='{name}' cannot be unpacked as gzip: .*[^.]; pack it anew, or take \.gz off its name if it is not"
    with pytest.raises(CalibrationError, match=message):
        judge(name, tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
        (TEXT.encode("utf-32"), "it is UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`"),
        (b"PAR1\x15\x04\x15\xa2\x80PAR1", "it is a parquet file; give it the ending .parquet"),
        (b"%PDF-1.5\n%\xbf\xf7\xa2\xfe\n", "it is a PDF; save its text to a file"),
    ],
)
def test_what_is_not_utf8_is_called_what_it_is(name, content, message, tokenizer, here):
    write(name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(CalibrationError, match=rf"text='{name}' cannot be read as [\w -]+: {message}"):
        judge(name, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PACKED, r"it is gzipped; give it the ending \.gz, or gunzip it"),
        (
            b"PK\x03\x04\x14\x00\x00\xff",
            "it is a zip archive, or a document that is one inside; unpack it, or save its",
        ),
        (b"\x28\xb5\x2f\xfd\x04\xff", "it is compressed by zstd; unpack it with unzstd"),
    ],
)
def test_what_is_packed_is_called_so(content, message, tokenizer, here):
    with pytest.raises(CalibrationError, match=rf"text='a\.txt' cannot be read as UTF-8 text: {message}"):
        judge(str(write("a.txt", content)), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\xe9 " + TEXT, " cannot be read as UTF-8 text: .*0xe9 in position 3"),
        # pandas 3 counts within the field, pandas 2 within the file
        ("a.csv", "text\ncaf\xe9\n", r" cannot be read as csv: .*0xe9 in position (3|8)[:;]"),
        (  # pandas 2 does not open it, pandas 3 does
            "a.jsonl",
            '{"text": "caf\xe9"}\n',
            r"(: a text in it| cannot be read as jsonl: line 1) is not UTF-8 \(.*0xe9 in position (3|13)[:;]",
        ),
        ("a.jsonl", '{"text": "caf\xe9"\n', r" cannot be read as jsonl: .*0xe9 in position 13[:;]"),  # nor is it JSON
    ],
)
def test_another_encoding_is_to_be_converted(name, content, message, tokenizer, here):
    write(name, content.encode("latin-1"))
    with pytest.raises(CalibrationError, match=f"text='{name}'{message}.*; convert it to UTF-8, such as with `iconv"):
        judge(name, tokenizer)


@pytest.mark.usefixtures("unprivileged")
def test_what_may_not_be_read_is_called_so(forks, here):
    code = f"""
import sys
sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
from unprivileged import become_ordinary
from optimum_eggs.calibration.documents import documents
become_ordinary()
for name in ("a.txt", "a.jsonl", "a.txt.gz", "closed/a.txt"):
    try:
        documents(name)
    except Exception as error:
        print(type(error).__name__, error)
"""
    Path("closed").mkdir()
    for name in ("a.txt", "a.jsonl", "a.txt.gz", "closed/a.txt"):
        write(name, TEXT).chmod(0)
    Path("closed").chmod(0)
    said = forks.run("-c", code, cwd=here, check=True).stdout.splitlines()
    Path("closed").chmod(0o755)
    of = f"------, its owner is {here.owner()}); allow it with `chmod u+"
    for name, line in zip(("a.txt", "a.jsonl", "a.txt.gz"), said[:-1], strict=True):
        assert line == f"CalibrationError calibration='{name}': may not be read (its permissions are ----{of}r`"
    why = f"{here}/closed may not be entered (its permissions are d---{of}x`"
    assert said[-1] == f"CalibrationError calibration='closed/a.txt': {why}"


def test_temporary_files_that_cannot_be_written_are_not_blamed_on_the_text(forks, here, tokenizer, monkeypatch):
    write("a.jsonl.gz", gzip.compress(lines({"text": TEXT}).encode()))
    code = """
import resource
from optimum_eggs.calibration.documents import documents
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
try:
    documents("a.jsonl.gz")
except Exception as error:
    print(type(error).__name__, error)
"""
    said = forks.run("-c", code, cwd=here, check=True).stdout
    start = " cannot be read without temporary files, which cannot be written ("
    end = "); make room for them, or name another folder for them by TMPDIR"
    assert said == f"CalibrationError calibration='a.jsonl.gz'{start}[Errno 27] File too large{end}\n"
    monkeypatch.setattr(tempfile, "tempdir", "gone")
    with pytest.raises(CalibrationError) as raised:
        judge("a.jsonl.gz", tokenizer)
    assert str(raised.value).startswith(f"text='a.jsonl.gz'{start}[Errno 2] No such file or directory: ")
    assert str(raised.value).endswith(end)


@pytest.mark.parametrize("way", WAYS)
def test_plain_text_has_no_column(way, tokenizer, here):
    write("a.txt", TEXT)
    for source in ("a.txt", "sample"):
        message = rf"='{source}' is plain text, without a column 'body'; leave out text_column= \(--text-column\), or"
        with pytest.raises(CalibrationError, match=message):
            way(source, tokenizer, text_column="body")


def test_a_column_is_asked_of_those_sources_that_have_columns(tokenizer, here):
    write("a.txt", TEXT)
    write("b.txt", TEXT)
    write("a.jsonl", lines({"title": "a", "body": TEXT}))
    mixed = calibrate({"a.txt": 1, "a.jsonl": 1}, tokenizer, text_column="body")
    assert torch.equal(mixed, calibrate({"a.txt": 1, "b.txt": 1}, tokenizer))
    settings = RecoverySettings(["a.txt", "a.jsonl"], seq_len=8, text_column="body")
    plain = RecoverySettings(["a.txt", "b.txt"], seq_len=8)
    for found, expected in zip(training_windows(settings, tokenizer), training_windows(plain, tokenizer), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(CalibrationError, match=r"calibration='a\.txt' is plain text, without a column 'body'"):
        calibrate({"a.txt": 1, "b.txt": 1}, tokenizer, text_column="body")
    with pytest.raises(CalibrationError, match=r"calibration='a\.jsonl' has no column 'text', only \['title', 'body'"):
        calibrate({"a.txt": 1, "a.jsonl": 1}, tokenizer, text_column="text")


def test_the_end_of_each_text_is_held_out_of_training(tokenizer, here):
    lengths = {"a.jsonl": 60, "b.jsonl": 30, "c.jsonl": 1}
    for start, (name, windows) in zip((1000, 2000, 3000), lengths.items(), strict=True):
        write(name, lines({"input_ids": list(range(start, start + 8 * windows))}))
    settings = RecoverySettings(list(lengths), seq_len=8, steps=50, held_out=0.1)
    train, held_out = training_windows(settings, tokenizer)
    ends = [1000 + 8 * i for i in range(55, 60)] + [2000 + 8 * i for i in range(27, 30)] + [3000]
    assert held_out[:, 0].tolist() == ends
    trained = train[:, 0].tolist()
    assert sorted(trained + ends) == sorted(
        start + 8 * i for start, count in zip((1000, 2000, 3000), lengths.values(), strict=True) for i in range(count)
    )
    assert trained != sorted(trained)


def test_no_window_is_held_out_where_none_is_asked_for(tokenizer, here):
    write("a.jsonl", lines({"input_ids": list(range(8 * 30))}))
    write("b.jsonl", lines({"input_ids": list(range(1000, 1000 + 8))}))
    for names in (["a.jsonl", "b.jsonl"], ["b.jsonl"]):
        train, held_out = training_windows(RecoverySettings(names, seq_len=8, steps=50, held_out=0), tokenizer)
        assert held_out.shape == (0, 8)
        assert sorted(train[:, 0].tolist()) == sorted([8 * i for i in range(30)] * (len(names) - 1) + [1000])


def test_short_training_holds_out_less_of_a_long_text(tokenizer, here):
    write("a.jsonl", lines({"input_ids": list(range(8 * 100))}))
    train, held_out = training_windows(RecoverySettings(["a.jsonl"], seq_len=8, steps=40, batch_size=1), tokenizer)
    assert len(train) == 40
    assert held_out[:, 0].tolist() == [8 * 98, 8 * 99]


def test_training_takes_its_share_of_each_text(tokenizer, here):
    for start, (name, windows) in zip((1000, 2000, 3000), {"a": 90, "b": 90, "c": 2}.items(), strict=True):
        write(f"{name}.jsonl", lines({"input_ids": list(range(start, start + 8 * windows))}))
    options = {"seq_len": 8, "steps": 40, "batch_size": 1}
    train, held_out = training_windows(RecoverySettings({"a.jsonl": 3, "b.jsonl": 1}, **options), tokenizer)
    kinds = [first // 1000 for first in train[:, 0].tolist()]
    assert (kinds.count(1), kinds.count(2)) == (30, 10)
    assert kinds != sorted(kinds)
    assert held_out[:, 0].tolist() == [1000 + 8 * 89, 2000 + 8 * 89]
    _, held_out = training_windows(RecoverySettings({"a.jsonl": 3, "b.jsonl": 1}, held_out=0.2, **options), tokenizer)
    assert [first // 1000 for first in held_out[:, 0].tolist()] == [1] * 6 + [2] * 2
    train, _ = training_windows(RecoverySettings({"a.jsonl": 1, "c.jsonl": 1}, **options), tokenizer)
    assert [first // 1000 for first in sorted(train[:, 0].tolist())] == [1] * 20 + [3]  # all but what is held out
    with pytest.raises(CalibrationError, match=r"train: the share 0.01 of 'b.jsonl' is too small .*, raise steps, or"):
        training_windows(RecoverySettings({"a.jsonl": 1, "b.jsonl": 0.01}, **options), tokenizer)
    with pytest.raises(CalibrationError, match=r"train: the share -1 of 'b.jsonl' is not a positive number"):
        RecoverySettings({"a.jsonl": 1, "b.jsonl": -1})


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_is_too_short_for_a_window_is_named(way, tokenizer, here):
    write("a.txt", "abc")
    with pytest.raises(CalibrationError, match=r"='a\.txt' has \d tokens, and .* of seq_len=8 needs? \d+.*; give more"):
        way("a.txt", tokenizer)


def test_a_short_text_among_others_is_not_passed_over(tokenizer, here):
    write("long.txt", TEXT)
    write("short.txt", "abc")
    with pytest.raises(
        CalibrationError, match=r"train='short\.txt' has \d tokens, .* smaller seq_len, or leave it out"
    ):
        training_windows(RecoverySettings(["long.txt", "short.txt"], seq_len=8), tokenizer)
    with pytest.raises(CalibrationError, match=r"calibration='short\.txt' has \d tokens, and num_samples=2 windows"):
        calibrate({"long.txt": 1, "short.txt": 1}, tokenizer)
