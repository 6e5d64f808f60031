from __future__ import annotations

import re
import traceback
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch

from optimum_eggs.calibration import token_windows
from optimum_eggs.calibration.documents import documents
from optimum_eggs.calibration.windows import needs_tokenizer, shares, token_stream, windows_digest
from optimum_eggs.errors import CalibrationError

TEXTS = [tiny.make_text(200, seed) for seed in range(10)]


def draw(source, tokenizer=None, **changes):
    return token_windows(source, tokenizer, **({"num_samples": 4, "seq_len": 8} | changes)).ids


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
    assert joined.tolist() == tokenizer("abc\n\n\n\ndef", add_special_tokens=False)["input_ids"]


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
    assert shares({"a": 1e308, "b": 1e308, "c": 1e308}, 32) == [11, 11, 10]


def test_the_digest_tells_windows_apart():
    ids = torch.arange(32).view(4, 8)
    assert windows_digest(ids) == windows_digest(ids.clone()) != windows_digest(ids + 1)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, 0

    def __call__(self, text, **options):
        self.seen += len(text)
        return self.tokenizer(text, **options)


@pytest.mark.slow
def test_a_large_text_is_tokenised_only_as_far_as_needed(tokenizer, tmp_path):
    text = "\n".join(f"{number} {TEXTS[number % 10]}" for number in range(3200))  # over 2 Mi characters
    (tmp_path / "large.txt").write_text(text)
    stream = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).unfold(0, 32, 1)
    starts = set()
    for sampling, seed in (("sequential", 0), ("random", 0), ("random", 1)):
        counting = Counting(tokenizer)
        windows = draw(tmp_path / "large.txt", counting, sampling=sampling, seed=seed, num_samples=8, seq_len=32)
        assert counting.seen < 100_000
        assert (stream == windows[0]).all(1).any()
        starts.add(tuple(windows[0].tolist()))
        if sampling == "sequential":
            assert torch.equal(windows, stream[: 8 * 32 : 32])
    assert len(starts) == 3


def test_a_text_that_is_not_large_is_drawn_from_as_a_whole(tokenizer):
    text = "\n".join(f"{number} {TEXTS[number % 10]}" for number in range(400))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    assert torch.equal(draw([text], tokenizer, num_samples=9), draw(ids, num_samples=9))


def test_a_short_text_gives_windows_that_overlap(caplog):
    ids = list(range(50))
    for sampling in ("sequential", "random"):
        windows = token_windows(ids, None, num_samples=20, seq_len=8, sampling=sampling)
        assert windows.overlapping
        starts = windows.ids[:, 0].tolist()
        assert [row.tolist() for row in windows.ids] == [ids[start : start + 8] for start in starts]
        assert len(set(starts)) == 20
        assert (starts[0], starts[-1]) == (0, 42)
        gaps = {b - a for a, b in pairwise(starts)}
        assert gaps == {2, 3}
    assert "has 50 tokens, and num_samples=20 windows of seq_len=8 need 160; the windows overlap" in caplog.text
    assert not token_windows(ids, None, num_samples=6, seq_len=8).overlapping


@pytest.mark.parametrize(
    ("tokens", "num_samples", "seq_len", "least"),
    [(19, 20, 8, 27), (26, 20, 8, 27), (15, 3, 8, 16), (99, 100, 8, 107), (127, 128, 8, 135), (1599, 100, 128, 1600)],
)
def test_a_text_may_not_be_too_short(tokens, num_samples, seq_len, least):
    with pytest.raises(CalibrationError, match=rf"has {tokens} tokens, .* or {least} at the least for windows that ov"):
        token_windows(list(range(tokens)), None, num_samples=num_samples, seq_len=seq_len)
    found = token_windows(list(range(least)), None, num_samples=num_samples, seq_len=seq_len)
    assert len({int(row[0]) for row in found.ids}) == num_samples


def test_a_mixture_says_that_one_of_its_texts_was_short(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 10)
    (tmp_path / "b.txt").write_text(TEXTS[1][:60])
    for sources, short in (({"a.txt": 1}, False), ({"a.txt": 1, "b.txt": 1}, True)):
        paths = {tmp_path / name: share for name, share in sources.items()}
        found = token_windows(paths, tokenizer, num_samples=12, seq_len=8)
        assert (found.overlapping, found.ids.shape) == (short, (12, 8))


ROWS = ["", " = A title = \n", "", " A line of a row . \n", " another ... \n", "", "", " = = Part = = \n", ""] * 700


def test_a_data_set_is_cut_as_published_scripts_cut_it(tokenizer):
    ids = tokenizer("\n\n".join(ROWS), add_special_tokens=False, verbose=False)["input_ids"]
    dataset = datasets.Dataset.from_dict({"text": ROWS})
    assert token_stream(documents(dataset), tokenizer).tolist() == ids
    found = draw(dataset, tokenizer, num_samples=50, seq_len=64, sampling="sequential")
    assert found.flatten().tolist() == ids[: 50 * 64]


def test_a_data_set_may_hold_token_ids():
    stream = torch.randint(100, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [stream[i : i + 8] for i in range(0, 80, 8)]
    even = datasets.Dataset.from_dict({"text": ["unused"] * 10, "input_ids": rows})
    assert draw(even, sampling="sequential").tolist() == rows[:4]
    assert all(row in rows for row in draw(even).tolist())
    assert torch.equal(draw(even.with_format("torch")), draw(even))
    ragged = datasets.Dataset.from_dict({"input_ids": [stream[:3], stream[3:50], stream[50:]]})
    assert draw(ragged, sampling="sequential").flatten().tolist() == stream[:32]
    padded = datasets.Dataset.from_dict(
        {
            "input_ids": [[0, 0, *stream[:6]], stream[6:14], stream[14:]],
            "attention_mask": [[0] * 2 + [1] * 6, [1] * 8, [1] * 76],
        }
    )
    assert draw(padded, sampling="sequential").flatten().tolist() == stream[:32]
    streamed = even.to_iterable_dataset().remove_columns("text")
    assert draw(streamed, sampling="sequential").tolist() == rows[:4]
    assert not needs_tokenizer(even)
    assert needs_tokenizer(even, text_column="text")


def test_a_column_of_token_ids_holds_nothing_else():
    with pytest.raises(CalibrationError, match="column 'input_ids' holds no lists of token ids"):
        draw(datasets.Dataset.from_dict({"input_ids": ["abc"]}))


def test_the_sample_needs_no_file_and_no_connection(tokenizer):
    (text,) = documents("sample")
    assert 300_000 < len(text) < 500_000
    for part in ("White Rabbit", "ORLANDO", "def ", "#include", "app.", "Iceland", "人", ">>> "):
        assert part in text
    assert draw("sample", tokenizer, num_samples=128, seq_len=512).shape == (128, 512)
    mixed = token_windows({"sample": 1, tuple(range(200)): 1}, tokenizer, num_samples=4, seq_len=8)
    assert len(mixed.ids) == 4


@pytest.mark.parametrize("name", ["sample", "c4"])
def test_a_file_with_the_name_of_something_known_is_not_passed_over(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine " * 100)
    with pytest.raises(CalibrationError, match=rf"calibration='{name}' is a name known .*; write './{name}' for the"):
        draw(name, tokenizer)
    assert torch.equal(draw(f"./{name}", tokenizer), draw(["mine " * 100], tokenizer))
    assert torch.equal(draw(Path(name), tokenizer), draw(["mine " * 100], tokenizer))


def test_a_folder_does_not_hide_what_is_known(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    assert draw("sample", tokenizer).shape == (4, 8)


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("me/data.v1", {}, {"path": "me/data.v1"}),
        ("me/data:plain", {}, {"path": "me/data", "name": "plain"}),
        ("me/data.v1:plain@abc", {}, {"path": "me/data.v1", "name": "plain", "revision": "abc"}),
        ("me/data@abc", {"config_name": "plain"}, {"path": "me/data", "name": "plain", "revision": "abc"}),
        ("me/data:own", {"config_name": "all"}, {"path": "me/data", "name": "own"}),
        ("me/data", {"revision": "abc", "token": "hf_x"}, {"path": "me/data", "revision": "abc", "token": "hf_x"}),
        ("wikitext2@abc", {}, {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "revision": "abc"}),
        (
            "c4",
            {"split": "validation"},
            {
                "path": "allenai/c4",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
            },
        ),
        ({"me/a:x": 1, "me/b": 1}, {"config_name": "y"}, {"path": "me/b", "name": "y"}),
    ],
)
def test_a_data_set_is_loaded_as_it_is_named(source, options, expected, tokenizer, monkeypatch):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    draw(source, tokenizer, **options)
    assert asked[-1] == {"split": "train"} | expected
    if isinstance(source, dict):
        assert asked[0] == {"path": "me/a", "name": "x", "split": "train"}


def test_a_split_that_a_named_data_set_lacks_is_refused_before_anything_is_loaded(tokenizer, monkeypatch):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("test", "train+test"):
        with pytest.raises(CalibrationError, match="calibration='c4' has no split 'test', only train and validation"):
            draw("c4", tokenizer, split=split)
    assert not asked
    draw("c4", tokenizer, split="train[:2]+validation[:2]")
    assert set(asked[0]["data_files"]) == {"train", "validation"}


def test_a_token_is_in_no_error(monkeypatch, tokenizer):
    secret = "hf_" + "abc" * 3  # not as it would stand in the line of code that a traceback shows

    def refuse(**arguments):
        raise ValueError(f"Illegal header value b'Bearer {arguments['token'].strip()}\\n'")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match=r"Illegal header value b'Bearer \*\*\*") as caught:
        draw("me/private", tokenizer, token=f"{secret}\n")
    assert secret not in "".join(traceback.format_exception(caught.value))


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
        (
            [],
            r"has 0 tokens, and num_samples=4 windows of seq_len=8 need 32, or 16 at the least for windows that overl",
        ),
        (["abc"], r"the text has \d+ tokens, and num_samples=4 windows of seq_len=8 need 32"),
        ({}, r"the mapping is empty"),
        ({"a": -1}, r"the share -1 of 'a' is not a positive number"),
        (3.5, r"calibration=3.5 is of no kind known here"),
        ("wikitext2:wikitext-103-raw-v1", r"name another by its id, 'Salesforce/wikitext:wikitext-103-raw-v1'"),
        ("no/such/file.txt", r"calibration='no/such/file.txt': there is no such file; check the path"),
        ("no/such/\ud800.txt", r"the path is not UTF-8, as safetensors, tokenizers and reports need it; rename"),
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
