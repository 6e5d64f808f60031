"""Tasks of lm-evaluation-harness: against choices scored by hand, and into report, page and card."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_eggs.cli.main import main
from optimum_eggs.errors import ConfigError, OutOfMemoryError
from optimum_eggs.evaluation import Score, TaskRunner, TaskScore, evaluate, task_differences
from optimum_eggs.evaluation.tasks import scores
from optimum_eggs.report import report_page
from optimum_eggs.sharing import model_card

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
EVALUATE = importlib.import_module("optimum_eggs.evaluation.evaluate")  # its package has a function of that name
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_tasks_alone(request, monkeypatch):
    """The harness's own tasks are thousands, and reading which there are takes ten seconds."""
    if "all_tasks" not in request.fixturenames:
        alone = partial(lm_eval_tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval_tasks, "TaskManager", alone)


@pytest.fixture
def all_tasks():
    """The harness's own tasks are there as well."""


@pytest.fixture(scope="module")
def task_folder(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    sizes = ["--context", "6", "--words", "3", "--questions", "12"]
    forks.run(EXAMPLES / "make_task.py", EXAMPLES / "data" / "judge.txt", folder, *sizes, check=True)
    return folder


@torch.no_grad()
def accuracy_by_hand(folder, tokenizer, questions):
    """The share of questions whose right continuation is the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = []
    for question in questions:
        start = tokenizer(question["context"], add_special_tokens=False)["input_ids"]
        chances = []
        for choice in question["choices"]:
            whole = tokenizer(f"{question['context']} {choice}", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            own = range(len(start), len(whole))
            chances.append(sum(float(logits[place - 1, whole[place]]) for place in own))
        right.append(chances.index(max(chances)) == question["answer"])
    return sum(right) / len(right)


@pytest.mark.slow
def test_results_are_right_and_reach_report_page_and_card(
    packed_folder, dense_folder, tokenizer, task_folder, tmp_path, capsys
):
    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"evaluations": [], "tasks": []}))
    options = ["--tasks", "continuation", "--include-path", str(task_folder), "--batch-size", "4"]
    for _ in range(2):  # the second takes the first's place
        assert main(["evaluate", str(folder), "--against", str(dense_folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "continuation (12 documents, 0 examples each)" in printed
    assert "perplexity" not in printed

    questions = [json.loads(line) for line in (task_folder / "continuation.jsonl").read_text().splitlines()]
    ours, theirs = (accuracy_by_hand(each, tokenizer, questions) for each in (folder, dense_folder))
    (entry,) = json.loads((folder / "report.json").read_text())["tasks"]
    assert entry["metrics"]["acc"]["value"] == pytest.approx(ours)
    assert entry["dense"]["acc"]["value"] == pytest.approx(theirs)
    assert entry["difference"]["acc"]["value"] == pytest.approx(ours - theirs)
    assert entry["difference"]["acc"]["low"] <= ours - theirs <= entry["difference"]["acc"]["high"]
    assert entry["metrics"]["acc"]["stderr"] > 0

    card = model_card(folder, "me/tiny")
    row = "| acc | continuation (lm-evaluation-harness, version 1.0), 12 documents, 0 examples each, float32 |"
    assert f"{row} {ours:.3f} ± " in card.text
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"]["name"] == "continuation"
    assert result["metrics"][0]["value"] == round(ours, 4)
    page = report_page(folder)
    assert "continuation, acc: dense" in page
    assert "continuation, acc: this model" in page


@pytest.mark.slow
def test_the_harness_itself_opens_a_packed_model_under_run(packed_folder, tokenizer, task_folder, tmp_path):
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={packed_folder},dtype=float32"]
    command += ["--tasks", "continuation", "--include_path", task_folder, "--device", "cpu", "--output_path", tmp_path]
    own = Path(sys.executable).with_name("lm_eval")
    command = [sys.executable, "-m", "optimum_eggs", "run", own, *command[1:]]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    (written,) = tmp_path.rglob("results_*.json")
    questions = [json.loads(line) for line in (task_folder / "continuation.jsonl").read_text().splitlines()]
    by_hand = accuracy_by_hand(packed_folder, tokenizer, questions)
    assert json.loads(written.read_text())["results"]["continuation"]["acc,none"] == pytest.approx(by_hand)


def test_json_and_text_and_tasks_together(packed_folder, text_file, task_folder, tmp_path, capsys):
    task_folder = shutil.copytree(task_folder, tmp_path / "tasks")  # with code of its own, that prints
    (task_folder / "utils.py").write_text(
        "def process_docs(documents):\n    print('processed')\n    return documents\n"
    )
    with (task_folder / "continuation.yaml").open("a") as task:
        task.write("process_docs: !function utils.process_docs\n")
    options = ["--tasks", "continuation", "--include-path", str(task_folder), "--limit", "4", "--no-record"]
    text = ["--text", str(text_file), "--seq-len", "16", "--num-windows", "2"]
    before = (packed_folder / "report.json").read_text()
    assert main(["evaluate", str(packed_folder), *options, *text, "--json"]) == 0
    said = capsys.readouterr()
    assert "processed" in said.err
    found = json.loads(said.out)["model"]
    assert found["perplexity"]["tokens"] == 2 * 15
    (task,) = found["tasks"]
    assert (task["task"], task["documents"], task["num_fewshot"]) == ("continuation", 4, 0)
    assert set(task["metrics"]["acc"]) == {"value", "stderr"}
    assert (packed_folder / "report.json").read_text() == before


def test_a_group_asked_for_is_one_row_and_its_tasks_are_not():
    row = {"acc,none": 0.5, "acc_stderr,none": 0.25, "alias": "a", "match,strict": 0.25, "match_stderr,strict": "N/A"}
    samples = [
        {"doc_id": 1, "filter": "none", "acc": 0.0},
        {"doc_id": 0, "filter": "none", "acc": 1.0},
        {"doc_id": 0, "filter": "strict", "match": 1.0},
        {"doc_id": 1, "filter": "strict", "match": 1.0},
    ]
    found = {
        "results": {"one": row, "two": row, "three": row},
        "groups": {"pair": row},
        "group_subtasks": {"pair": ["one", "two"], "three": []},
        "n-samples": {name: {"original": 9, "effective": 2} for name in ("one", "two", "three")},
        "n-shot": {"one": 0, "two": 5, "three": 3},
        "versions": {"pair": 2, "three": 1.0},
        "samples": {"one": [], "two": [], "three": samples},
    }
    group, task = scores(found, ["pair", "three"])
    metrics = {"acc": Score(0.5, 0.25), "match (strict)": Score(0.25, None)}
    assert group == TaskScore("pair", "2", None, 4, metrics, {})
    # `match` is 1 in both documents but 0.25 as a whole: no mean, so no difference can be made of it.
    assert task == TaskScore("three", "1.0", 3, 2, metrics, {"acc": [1.0, 0.0]})
    assert [each.task for each in scores(found, ["one", "two", "three"])] == ["one", "two", "three"]


def test_differences_pair_the_documents():
    def score(values):
        return TaskScore("t", "1", 0, len(values), {}, {"acc": values})

    found = task_differences(score([1.0, 1.0, 0.0, 1.0]), score([1.0, 0.0, 0.0, 0.0]))["acc"]
    # differences 0, 1, 0, 1: mean 1/2, standard error 1/√12, t of 3 degrees of freedom 3.182
    assert found.value == 0.5
    assert found.high - found.value == pytest.approx(3.182446 / 12**0.5, rel=1e-5)
    assert task_differences(score([1.0]), score([1.0, 0.0])) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to judge on; give text (--text), tasks (--tasks) or both"),
        (["--tasks", "arc_easy", "--include-path", "nowhere"], "include_path='nowhere' (--include-path) is no folder"),
    ],
)
def test_bad_input_is_refused(packed_folder, options, message, capsys):
    assert main(["evaluate", str(packed_folder), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [({"limit": 0}, "limit=0 must be at least 1"), ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0")],
)
def test_numbers_out_of_range_are_refused(packed_folder, option, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(packed_folder, tasks=["arc_easy"], **option)


def test_a_task_that_is_unknown_is_refused_with_what_is_near(packed_folder, task_folder, capsys):
    own = ["--include-path", str(task_folder)]
    assert main(["evaluate", str(packed_folder), "--tasks", "continuatoin", *own]) == 2
    assert (
        "task 'continuatoin' is unknown to lm-evaluation-harness; did you mean continuation" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_tasks_of_the_harness_are_known(all_tasks, packed_folder, capsys):
    assert main(["evaluate", str(packed_folder), "--tasks", "arc_eazy"]) == 2
    assert "did you mean arc_easy" in capsys.readouterr().err


def test_a_task_whose_data_are_missing_is_refused(packed_folder, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: /nowhere/at/all.jsonl}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    assert main(["evaluate", str(packed_folder), "--tasks", "broken", "--include-path", str(tmp_path)]) == 2
    assert "tasks=['broken']: cannot be run: " in capsys.readouterr().err


BROKEN = {
    "a package that is not there": (
        "raise ModuleNotFoundError('no words here')\n",
        "ModuleNotFoundError: no words here",
    ),
    "an error of its own": ("def read(): pass\nread(1)\n", "TypeError: "),
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_task_that_cannot_run_is_refused_before_anything_is_judged(
    code, packed_folder, task_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(EVALUATE, "read", None)
    folder = shutil.copytree(task_folder, tmp_path / "tasks")
    code, message = BROKEN[code]
    (folder / "utils.py").write_text(f"{code}def process_docs(documents):\n    return documents\n")
    with (folder / "continuation.yaml").open("a") as task:
        task.write("process_docs: !function utils.process_docs\n")
    options = ["--tasks", "continuation", "--include-path", str(folder), "--text", str(text_file), "--seq-len", "16"]
    assert main(["evaluate", str(packed_folder), *options]) == 2
    assert f"tasks=['continuation']: cannot be run: {message}" in capsys.readouterr().err


def test_what_a_task_raises_while_it_runs_is_named(packed_folder, task_folder, tmp_path, capsys):
    folder = shutil.copytree(task_folder, tmp_path / "tasks")
    (folder / "utils.py").write_text("def score(question, answers):\n    raise ImportError('no judge')\n")
    with (folder / "continuation.yaml").open("a") as task:
        task.write("process_results: !function utils.score\n")
    options = ["--tasks", "continuation", "--include-path", str(folder), "--limit", "2"]
    assert main(["evaluate", str(packed_folder), *options]) == 2
    assert "cannot be run: ImportError: no judge" in capsys.readouterr().err


def test_memory_that_is_out_while_tasks_run_is_named_as_such(packed_folder, task_folder, monkeypatch):
    def run_out(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("lm_eval.simple_evaluate", run_out)
    with pytest.raises(OutOfMemoryError, match="give a smaller batch_size or seq_len"):
        evaluate(packed_folder, tasks=["continuation"], include_path=task_folder)


def test_a_task_that_runs_code_of_the_model_is_refused(task_folder, tmp_path):
    folder = shutil.copytree(task_folder, tmp_path / "tasks")
    with (folder / "continuation.yaml").open("a") as task:
        task.write("unsafe_code: true\n")
    with pytest.raises(ConfigError, match="task 'continuation' runs code that the model writes"):
        TaskRunner.create(["continuation"], include_path=folder)


def test_a_tokenizer_without_a_chat_template_is_refused_first(packed_folder, task_folder, monkeypatch, capsys):
    monkeypatch.setattr(EVALUATE, "load_model", None)
    options = ["--tasks", "continuation", "--include-path", str(task_folder), "--apply-chat-template"]
    assert main(["evaluate", str(packed_folder), *options]) == 2
    assert f"the tokenizer of {packed_folder} has no chat template" in capsys.readouterr().err


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm_eval>=0.4.12'"):
        TaskRunner.create(["arc_easy"])


def test_a_text_too_short_for_four_questions_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("only a few words")
    monkeypatch.setattr(sys, "argv", ["make_task.py", str(tmp_path / "short.txt"), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "make_task.py"), run_name="__main__")
    assert "has 4 words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_left_out_and_said(caplog):
    row = {"alias": "mine", "acc,none": 0.5, "word_perplexity,none": float("inf"), "f1,none": float("nan")}
    found = {"results": {"mine": row}, "samples": {"mine": []}, "n-samples": {"mine": {"effective": 3}}}
    (score,) = scores(found | {"versions": {"mine": 1}, "n-shot": {"mine": 0}}, ["mine"])
    assert score.metrics == {"acc": Score(0.5, None)}
    assert "mine: the harness gave inf for word_perplexity, which is left out" in caplog.text
