from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch

from optimum_eggs.calibration import token_windows
from optimum_eggs.calibration.windows import shares, token_stream, windows_digest
from optimum_eggs.errors import CalibrationError

TEXTS = [tiny.make_text(200, seed) for seed in range(10)]


def draw(source, tokenizer=None, **changes):
    return token_windows(source, tokenizer, **({"num_samples": 4, "seq_len": 8} | changes))


def test_sequential_windows_are_the_first_tokens_end_to_end(tokenizer, text_file):
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    windows = draw(text_file, tokenizer, sampling="sequential")
    assert windows.flatten().tolist() == ids[:32]


def test_a_file_may_be_named_by_a_string(tokenizer, text_file):
    assert torch.equal(draw(str(text_file), tokenizer), draw(text_file, tokenizer))


def test_random_windows_follow_the_seed_and_come_from_the_text(tokenizer, text_file):
    first, again, other = (draw(text_file, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stream = token_stream([text_file.read_text()], tokenizer).unfold(0, 8, 1)
    assert all((stream == window).all(1).any() for window in first)


def test_texts_and_a_dataset_of_them_give_the_same_windows(tokenizer):
    dataset = datasets.Dataset.from_dict({"body": TEXTS})
    for sampling in ("sequential", "random"):
        a = draw(TEXTS, tokenizer, sampling=sampling)
        b = draw(dataset, tokenizer, sampling=sampling, text_column="body")
        assert torch.equal(a, b)


def test_texts_are_joined_with_blank_lines(tokenizer):
    joined = token_stream(["abc", "", "def"], tokenizer)
    assert joined.tolist() == tokenizer("abc\n\ndef", add_special_tokens=False)["input_ids"]


def test_a_streamed_dataset_is_read_only_as_far_as_needed(tokenizer):
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"text": TEXTS[number % len(TEXTS)]}

    streamed = datasets.IterableDataset.from_generator(rows)
    assert draw(streamed, tokenizer).shape == (4, 8)
    assert len(read) < 100


def test_a_long_text_is_cut_into_pieces_at_line_ends(tokenizer):
    text = "\n".join(TEXTS) * 20  # over 128 Ki characters
    assert len(text) > 1 << 17
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert token_stream([text], tokenizer).tolist() == whole


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_token_ids_are_taken_as_they_are(kind):
    stream = list(range(40))
    assert draw(kind(stream), sampling="sequential").tolist() == [stream[i : i + 8] for i in range(0, 32, 8)]
    rows = [stream[i : i + 8] for i in range(0, 40, 8)]
    assert draw(kind(rows), sampling="sequential").tolist() == rows[:4]
    chosen = draw(kind(rows), sampling="random").tolist()
    assert all(row in rows for row in chosen)
    assert len({tuple(row) for row in chosen}) == 4


def test_ragged_token_lists_are_one_stream():
    assert draw([[1, 2, 3], list(range(4, 40))], sampling="sequential").flatten().tolist() == list(range(1, 33))


def test_a_mixture_gives_each_source_its_share(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a " * 400)
    (tmp_path / "b.txt").write_text("b " * 400)
    mixture = {tmp_path / "a.txt": 3, tmp_path / "b.txt": 1}
    windows = draw(mixture, tokenizer, num_samples=8)
    token = tokenizer("b a", add_special_tokens=False)["input_ids"][-1]  # with its leading space
    assert sum(token in window for window in windows.tolist()) == 6


def test_shares_add_up():
    assert shares({"a": 1, "b": 1, "c": 1}, 32) == [11, 11, 10]
    assert shares({"a": 1e-9, "b": 1}, 4) == [0, 4]


def test_the_digest_tells_windows_apart():
    ids = torch.arange(32).view(4, 8)
    assert windows_digest(ids) == windows_digest(ids.clone()) != windows_digest(ids + 1)


def test_named_data_sets_are_asked_for_by_their_hub_id(monkeypatch, tokenizer):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    draw("wikitext2", tokenizer)
    draw("c4", tokenizer, split="validation")
    draw("someone/some-texts", tokenizer)
    draw("someone/some-texts-1.0", tokenizer)
    assert asked[0] == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}
    assert asked[1]["path"] == "allenai/c4"
    assert asked[1]["split"] == "validation"
    assert asked[2] == {"path": "someone/some-texts", "split": "train"}
    assert asked[3] == {"path": "someone/some-texts-1.0", "split": "train"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"calibration=None: pass a text file"),
        ([], r"the text has 0 tokens, and num_samples=4 windows of seq_len=8 need 32; give more text"),
        (["abc"], r"the text has \d+ tokens, and num_samples=4 windows of seq_len=8 need 32"),
        ({}, r"the mapping is empty"),
        ({"a": -1}, r"the share -1 of 'a' is not a positive number"),
        (3.5, r"calibration=3.5 is of no kind known here"),
        ("no/such/file.txt", r"calibration='no/such/file.txt': there is no such file; check the path"),
        ("no/such/\ud800.txt", r"there is no such file; check the path"),
        ("one\ntwo", r"a single string is the name of a file"),
        ("words " * 100, r"a single string is the name of a file"),
        (torch.zeros(2, 2), r"token ids of dtype torch.float32"),
        ([["a"]], r"must hold token ids"),
        ([[1] * 8] * 2, r"2 windows of 8 tokens given, and num_samples=4 are needed; lower num_samples"),
    ],
)
def test_bad_sources_are_named(tokenizer, source, message):
    with pytest.raises(CalibrationError, match=message):
        draw(source, tokenizer)


def test_text_needs_a_tokenizer():
    with pytest.raises(CalibrationError, match="tokenizer=None"):
        draw(TEXTS)


def test_a_folder_is_no_text(tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match=re.escape(f"calibration={str(tmp_path)!r} is a folder")):
        draw(tmp_path, tokenizer)


def test_a_file_that_is_no_text(tokenizer, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8 text"):
        draw(tmp_path / "x.bin", tokenizer)


def test_a_file_in_a_folder_that_may_not_be_searched(tokenizer, monkeypatch):
    def is_file(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(
        CalibrationError, match=r"'closed/x.txt' cannot be looked at: .*denied.*; check the path and its"
    ):
        draw("closed/x.txt", tokenizer)


def test_a_column_that_is_not_there(tokenizer):
    with pytest.raises(CalibrationError, match=r"has no column 'text', only \['body'\]; pass text_column="):
        draw(datasets.Dataset.from_dict({"body": TEXTS}), tokenizer)


def test_a_column_that_is_no_text(tokenizer):
    with pytest.raises(CalibrationError, match="holds int, not text"):
        draw(datasets.Dataset.from_dict({"text": [1, 2]}), tokenizer)


def test_a_data_set_that_cannot_be_had(monkeypatch, tokenizer):
    def refuse(**arguments):
        raise ConnectionError("no way through")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match="is no file, and could not be loaded as a data set: no way through"):
        draw("someone/some-texts", tokenizer)
