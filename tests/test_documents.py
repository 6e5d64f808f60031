"""Every command and every program in the documents is run as it stands, at a small size, in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from optimum_eggs import EGGSConfig, EGGSPruner

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "tests" / "sharing"))
from forks import Forks  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"optimum-cli eggs \w+ [^-]|(\w+=\w+ )*python \S+\.py|pip install|make \w")

SMALLER = {  # the last of two equal options counts
    "optimum-cli eggs prune": "--num-samples 4 --seq-len 32",
    "-m optimum_eggs prune": "--num-samples 4 --seq-len 32",
    "optimum-cli eggs evaluate": "--num-windows 2 --seq-len 32",
    "optimum-cli eggs benchmark": "--repeats 1 --layer-repeats 1 --prompt 8 --new-tokens 2",
    "optimum-cli eggs recover": "--steps 8 --seq-len 16",
    "python benchmarks/layers.py": "--shapes 64x64 --tokens 1 --repeats 1",
    "python benchmarks/streaming.py": "--layers 2 --hidden 128 --vocabulary 500 --num-samples 4 --seq-len 32",
    "python benchmarks/ranks.py": "--num-samples 8 --seq-len 16 --num-windows 2 --test-seq-len 32",
    "python benchmarks/cost_model.py": "--num-samples 4 --seq-len 16 --hidden 128 --intermediate 256",
    "python tests/fuzz/fuzz_checkpoints.py": "--runs 10",
    "python benchmarks/permutation.py": "--inputs 64 --rows 16",
    "python benchmarks/gpu.py": "--device cpu --tests",
    "python benchmarks/merging.py": "--seq-len 16 --batch-size 1 --steps 1 --test-windows 1 --test-seq-len 16",
    "python benchmarks/training.py": "--batch-size 1 --seq-len 16 --steps 1 --warm-up 1",
    "python benchmarks/peers.py": "--prompt 8 --new-tokens 2 --seq-len 16 --rounds 1 --repeats 1 --compiled --llama",
    "python benchmarks/quality.py": "--num-samples 4 --seq-len 16 --test-windows 2 --test-seq-len 32",
    "python benchmarks/frontier.py": "--num-samples 4 --seq-len 16 --test-windows 2 --test-seq-len 32 --steps 2",
    "pip install": "--dry-run --no-deps --no-build-isolation --quiet",
}
PACKED = ["out", "best", "values", "lora", "p24", "r24", "p24-int8", "p24-int4", "twin/packed", "l1b/packed"]
SPARSE = ["sparse"]  # dense, with zeros
DENSE = ["path/or/id", "path/or/dense", "dense", "sm2", "qwen", "qwen05", "qwen15", "twin/dense", "l1b/dense"]
TEXTS = [
    "calibration.txt",
    "other.txt",
    "text.txt",
    "wiki.valid.raw",
    "wiki.test.raw",
    "emma.txt",
    "pride_and_prejudice.txt",
]


def parts(document):
    """(language, code) of every fenced block, and ("bash", code) of every command within a sentence."""
    text = document.read_text()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    return [*FENCE.findall(text), *(("bash", span + "\n") for span in spans if COMMAND.match(span))]


RUN = [
    pytest.param(code, language, id=f"{document.relative_to(ROOT)}-{index}")
    for document in DOCUMENTS
    for index, (language, code) in enumerate(parts(document))
    if language != "text"
]


def smaller(line):
    """A line of a shell's block, so that it ends soon, and writes nothing outside its folder."""
    line, _, _ = line.partition("  #")
    if line.startswith("make "):
        return line.replace("make", "make --dry-run", 1)
    if "--tasks arc_easy" in line:  # its data would come from the Hub
        return f"! HF_HUB_OFFLINE=1 {BIN}/{line} 2> refusal; grep -q 'arc_easy.*reach .*on the Hub' refusal"
    if line.startswith("python benchmarks/quality.py"):  # a process for every method: one of them
        line = re.sub(r"(--methods|--patterns) (?:[^-]\S* )*([^-\s]\S*)(?= |$)", r"\1 \2", line)
        line += "" if "--methods" in line else " --methods fast"
        line += " --blocks 1" if "--blocks" in line else ""
    if line.startswith("pip "):
        return f"(cd {ROOT.name}; {line} {SMALLER['pip install']})"
    for command, options in SMALLER.items():
        if command in line:
            line += " --limit 2" if "--tasks" in line else f" {options}"
    line = line.replace("make_packed.py llama-1b", "make_packed.py dense")
    return line.replace("python tests/", f"python {ROOT}/tests/")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, text_file):
    """A dense model that reads as far as the documents' windows reach, and the same packed."""
    folder = tmp_path_factory.mktemp("models")
    kind, config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = 2048
    kind._from_config(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    pruner = EGGSPruner.from_pretrained(folder / "dense")
    pruner.prune(EGGSConfig("2:4", num_samples=4, seq_len=16), calibration=text_file)
    pruner.save_pretrained(folder / "packed")
    pruner.model.dequantize().save_pretrained(folder / "sparse")
    tokenizer.save_pretrained(folder / "sparse")
    (folder / "calibration.txt").write_text(tiny.make_text(128 * 512))  # as many tokens as a configuration asks for
    return folder


@pytest.fixture
def world(tmp_path, models, text_file):
    """A folder with what the documents name, but for what `code` writes itself."""

    def made(code):
        for name in DENSE:
            shutil.copytree(models / "dense", tmp_path / name)
        for name in SPARSE:
            shutil.copytree(models / "sparse", tmp_path / name)
        for name in PACKED:
            if not re.search(rf"eggs (prune|pack|quantize|recover) \S+ {name}\s|save_pretrained\(\"{name}\"", code):
                shutil.copytree(models / "packed", tmp_path / name)
        for name in TEXTS:
            shutil.copy(text_file if name != "calibration.txt" else models / name, tmp_path / name)
        for name in ("examples", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, tmp_path / name)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        if "pip install" in code:
            unwanted = shutil.ignore_patterns(".*", "venv", "build", "site", "*.so", "*-out", "__pycache__", "results")
            shutil.copytree(ROOT, tmp_path / ROOT.name, ignore=unwanted)
        return tmp_path

    return made


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A hub, and processes that know no other."""
    with LoopbackHub(user="me") as hub:
        known = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(tmp_path_factory.mktemp("clients") / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        with Forks(**known) as forks:
            yield hub, forks


@pytest.mark.slow
@pytest.mark.parametrize(("code", "language"), RUN)
def test_what_the_documents_say_runs(code, language, clients, world):
    assert language in ("python", "bash"), "say what a block is, or call it text"
    hub, forks = clients
    hub.clear()
    shutil.rmtree(forks.environment["HF_HOME"], ignore_errors=True)
    folder = world(code)
    if language == "bash":
        environment = forks.environment | {"PATH": os.pathsep.join([str(forks.bin), str(BIN), os.environ["PATH"]])}
        command = ["bash", "-euxc", "\n".join(map(smaller, code.splitlines()))]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    else:
        done = forks.run("-c", code, cwd=folder)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert hub.unknown == []
