"""Every example is run as its own docstring says, at a small size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from safetensors import safe_open

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
SMALL = ["--num-samples", 4, "--seq-len", 16]
ELSEWHERE = [TESTS / "recovery" / "test_lora.py", TESTS / "slow" / "test_smollm2.py"]


@pytest.fixture
def run(forks):
    def run(script, *arguments, check=True):
        done = forks.run(EXAMPLES / script, *arguments)
        assert (done.returncode == 0) == check, done.stderr[-3000:]
        return done.stdout if check else done.stderr

    return run


def metadata(folder):
    """Names of the packed layers in a checkpoint."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return [name for name in file.keys() if name.endswith(".weight_meta")]  # noqa: SIM118


def test_quickstart(run, dense_folder, text_file, tmp_path):
    printed = run("quickstart.py", dense_folder, tmp_path / "out", "--text", text_file, *SMALL)
    assert "keeps" in printed
    assert len(metadata(tmp_path / "out")) == 14
    assert (tmp_path / "out" / "report.json").exists()


def test_prune_on_load(run, dense_folder, text_file, tmp_path):
    printed = run("prune_on_load.py", dense_folder, tmp_path / "out", "--text", text_file, *SMALL)
    assert "7 layers are packed, from model.layers.1.self_attn.q_proj" in printed
    assert "made dense again: Linear" in printed
    assert all("layers.1." in name for name in metadata(tmp_path / "out"))


def test_custom_importance(run, dense_folder, text_file):
    printed = run("custom_importance.py", dense_folder, "--text", text_file, "--judge", text_file, *SMALL)
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["ria", "balanced_wanda"]


@pytest.mark.slow
def test_push_to_hub_without_a_token(packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "packed")  # its card is written anew
    known = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, EXAMPLES / "push_to_hub.py", folder, "me/model-2-4"]
    done = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "published: http://127.0.0.1" in done.stdout
    assert "loaded: 14 packed layers" in done.stdout


def test_make_task(run, text_file, tmp_path):
    run("make_task.py", text_file, tmp_path / "tasks", "--questions", 7)
    questions = [json.loads(line) for line in (tmp_path / "tasks" / "continuation.jsonl").read_text().splitlines()]
    text = " ".join(text_file.read_text().split())
    assert len(questions) == 7
    for question in questions:
        real = [f"{question['context']} {choice}" in text for choice in question["choices"]]
        assert real[question["answer"]]
        assert len(set(question["choices"])) == 4


def test_a_text_too_short_for_a_task_is_refused(run, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    assert "3 words" in run("make_task.py", tmp_path / "short.txt", tmp_path / "tasks", check=False)
    assert not (tmp_path / "tasks").exists()


@pytest.mark.slow
def test_notebook(dense_folder, text_file, tmp_path, monkeypatch):
    values = {"MODEL": dense_folder, "TEXT": text_file, "JUDGE": text_file, "OUT": tmp_path / "out"}
    for name, value in (values | {"NUM_SAMPLES": 4, "SEQ_LEN": 32, "OMP_NUM_THREADS": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "".join(output.get("text", "") for output in outputs).count("perplexity") > 0
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_example_is_run():
    tested = "".join(test.read_text() for test in (Path(__file__), *ELSEWHERE))
    for script in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f'"{script.name}"' in tested, script.name
