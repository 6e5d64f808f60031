"""A report whose values are of other kinds: whatever reads it works, or names the file, the key and what is there."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from optimum_eggs.cli.main import main
from optimum_eggs.engine.report import read_report, text_uses, update_report, used_texts, without_measurements
from optimum_eggs.errors import CheckpointError, EGGSError
from optimum_eggs.evaluation import Score, TaskScore, evaluate, record
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.report import page
from optimum_eggs.sharing import model_card, push_folder

pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GOLDEN = Path(__file__).parent / "golden" / "v1" / "packed"
WRONG = (None, "x", 0, 10**400, True, [], ["x"], {}, {"x": "x"})
GONE = object()


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def full(packed_folder, dense_folder, text_file, tmp_path_factory):
    """A model that was pruned, recovered, judged and timed, and what judging it gave."""
    folder = tmp_path_factory.mktemp("full") / "model"
    small = ["--steps", 2, "--seq-len", 16, "--batch-size", 2, "--rank", 2]
    run("recover", packed_folder, folder, "--train", text_file, "--teacher", dense_folder, *small)
    found = evaluate(folder, dense_folder, text=text_file, seq_len=16, num_windows=4)
    task = TaskScore("choice", "1", 0, 9, {"acc": Score(0.5, 0.25)}, {})
    ours, theirs = (replace(each, tasks=[task]) for each in (found.model, found.against))
    found = replace(found, model=ours, against=theirs, task_differences={"choice": {}})
    assert record(found, folder)
    few = ["--prompt", 4, "--new-tokens", 2, "--repeats", 1, "--layer-repeats", 1, "--batch", 1]
    run("benchmark", folder, "--against", dense_folder, *few)
    report = json.loads((folder / "report.json").read_text())
    assert {"layers", "evaluations", "tasks", "benchmark", "recovery"} <= report.keys()
    report["layers"] = report["layers"][-1:]
    report["recovery"]["texts"] = copy.deepcopy(report["calibration"]["texts"])
    report["tuning"] = [{"block": 0, "error_before": 0.5, "error_after": 0.25, "steps": 4, "kept": True}]
    report["calibration"]["generated"] = 2
    report["rounding"] = copy.deepcopy(report["tuning"])
    report["rotation"] = {"lost_before": 0.112, "lost_after": 0.091}
    report["quantization"] = {
        "values": "int4",
        "value_group": 128,
        "rounding": "gptq",
        "rounding_tuning": 4,
        "head": "int8",
        "ignored": "int8",
        "calibration": copy.deepcopy(report["calibration"]) | {"source": "text.txt"},
    }
    # One of a kind is enough of what is many times there.
    report["files"] = {"model.safetensors": report["files"]["model.safetensors"]}
    report["measurements"]["stages"] = dict([next(iter(report["measurements"]["stages"].items()))])
    report["layers"][0]["certificate"]["floors"] = {"16": 1}
    return folder, report, found


def places(value, where=()):
    """Where every value of a report is; of a list only the first entry is gone into."""
    yield where
    parts = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*where, key))


def changed(report, where, value):
    """A copy of a report with another value in a place, or without the key."""
    made = copy.deepcopy(report)
    holder = made
    for key in where[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    return made


def consumers(folder, found):
    """Whatever reads a report, as one call each."""
    yield "evaluate", lambda: text_uses(read_report(folder), found.conditions.described)
    yield "recover", lambda: used_texts(without_measurements(read_report(folder)))
    yield "card", lambda: model_card(folder, "me/tiny")
    yield "page", lambda: page.report_page(folder)
    yield "push", lambda: push_folder(folder, "me/tiny")
    yield "record", lambda: record(found, folder)  # the last, since it writes


def outcome(call):
    """What a call ended with: None, or its error as a text; any but this package's are raised."""
    try:
        call()
    except EGGSError as error:
        return str(error)
    return None


PARTS = [
    "summary", "config", "calibration", "base_model", "layers", "tuning", "left_dense", "measurements", "files",
    "evaluations", "tasks", "benchmark", "recovery", "rotation", "rounding", "quantization", "versions", "warnings",
    "report_version",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_value_of_another_kind_is_read_or_named_by_whatever_reads_it(part, full, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(page, "_svg", lambda figure: "<svg/>")  # drawing takes most of the time
    folder, report, found = full
    assert report.keys() == set(PARTS)
    file = folder / "report.json"
    unread = []
    for where in places(report[part], (part,)):
        texts = {repr(value): json.dumps(changed(report, where, value)) for value in (GONE, *WRONG)}
        taken = {}
        for value, text in texts.items():
            file.write_text(text)
            if outcome(lambda: read_report(folder)) is None:
                taken[value] = text
                continue
            (violation,) = (each for each in inspect_checkpoint(folder).violations if each.where == "report.json")
            assert violation.rule == "report"
            for name, call in consumers(folder, found):
                said = outcome(call) or "nothing"
                assert said.startswith((f"{file}: {part}", f"{file}: lacks {part}")), (name, where, value, said)
                assert said.endswith("; save the model again, or move the file away")
        if len(taken) == len(texts):  # nothing reads it
            unread.append(where)
            continue
        for value, text in taken.items():
            works_or_says_why(folder, found, text, f"{where} = {value}")
    inner = [where for where in unread if not any(other[: len(where)] == where for other in unread if other != where)]
    for value in WRONG[:2] if inner else ():
        made = report
        for where in inner:
            made = changed(made, where, value)
        works_or_says_why(folder, found, json.dumps(made), f"{value!r} in {inner}")


def works_or_says_why(folder, found, text, what):
    """Have all consumers read the report of that text."""
    for name, call in consumers(folder, found):
        (folder / "report.json").write_text(text)
        try:
            outcome(call)
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("evaluations", 0), "x", "evaluations[0] is 'x', where a report has an object"),
        (
            ("evaluations", 0, "metrics", "perplexity"),
            "12",
            "evaluations[0].metrics.perplexity is '12', where a report",
        ),
        (("recovery", "perplexity_after"), 1e308, "recovery.perplexity_after is 1e+308, where a report has a number"),
        (("layers",), [], "layers is [], where a report has a list that is not empty"),
        (("layers", 0, "certificate"), GONE, "layers[0] lacks certificate"),
        (("layers", 0, "pattern"), "2-4", "layers[0].pattern is '2-4', where a report has a pattern such as '2:4'"),
        (("calibration", "texts"), None, "calibration.texts is None, where a report has a list"),
        (("benchmark", "models"), [], "benchmark.models is [], where a report has a list that is not empty"),
        (("files",), 5, "files is 5, where a report has an object"),
        (("recovery",), [], "recovery is [], where a report has an object"),
        (("summary",), GONE, "lacks summary"),
    ],
)
def test_the_file_the_key_and_what_is_there_are_named(where, value, message, full):
    folder, report, _ = full
    (folder / "report.json").write_text(json.dumps(changed(report, where, value)))
    said = outcome(lambda: read_report(folder))
    assert said.startswith(f"{folder / 'report.json'}: {message}")


def test_a_layer_that_the_weights_do_not_have_is_named(full):
    folder, report, _ = full
    for place, value in ((("name",), "x"), (("out_features",), 4), (("scores_alone", "row"), 4000)):
        (folder / "report.json").write_text(json.dumps(changed(report, ("layers", 0, *place), value)))
        said = outcome(lambda: page.report_page(folder))
        assert said.startswith(
            f"{folder / 'report.json'}: {'x' if place == ('name',) else report['layers'][0]['name']}: "
        )
    (folder / "report.json").write_text(json.dumps(changed(report, ("layers", 0, "name"), "x")))
    assert ": x: is no packed layer of the model" in outcome(lambda: page.report_page(folder, with_spectra=True))


def test_what_is_whole_is_read_and_so_is_what_earlier_releases_wrote(full, tmp_path):
    folder, report, found = full
    (folder / "report.json").write_text(json.dumps(report))
    old = shutil.copytree(GOLDEN, tmp_path / "old")
    for each in (folder, old):
        assert read_report(each)
        assert "The certificate" in model_card(each).text
        assert "Every layer" in page.report_page(each)
        assert record(found, each)
    # Names of texts, no descriptions of them: reports before those had any.
    names = {"config": {"calibration": "c4"}, "recovery": {"settings": {"train": ["a.txt"]}}}
    assert used_texts(names) == {"calibrated": [{"name": "c4"}], "trained": [{"name": "a.txt"}]}


def test_numbers_that_no_float_holds_and_endless_nesting_are_no_json(full):
    folder, report, _ = full
    whole = json.dumps(changed(report, ("recovery", "perplexity_after"), 1234.5))
    for text in (whole.replace("1234.5", "1e999"), "[" * 100_000):
        (folder / "report.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"report\.json: is no JSON \(.*\); save the model again"):
            read_report(folder)
        assert not inspect_checkpoint(folder).ok


def test_a_record_without_a_pruning_gives_no_card(full):
    folder, _, _ = full
    (folder / "report.json").write_text("{}")
    assert update_report(folder, recovery=None)
    with pytest.raises(EGGSError, match=r"has no report\.json of a pruned model"):
        model_card(folder)
