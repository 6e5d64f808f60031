"""Whole models on the device: pruned, tuned, saved, loaded, run, trained."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from oracles import gaussian
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import states
from optimum_eggs.calibration.states import StatesOnHost
from optimum_eggs.engine import prune_model
from optimum_eggs.evaluation import perplexity
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers
from optimum_eggs.presets import PRESETS
from optimum_eggs.streaming import prune_checkpoint

WINDOWS = tiny.make_windows(16, 16)
STEPS = 28


def configured(preset="fast", **values):
    """A configuration for the tiny models; block tuning, where the preset has it, takes fewer steps."""
    if PRESETS[preset]["block_tuning"]:
        values = {"block_tuning": STEPS, "batch_size": 2} | values
    return EGGSConfig("2:4", preset=preset, num_samples=16, seq_len=16, **values)


def pruned(name, config, place, dtype=torch.float32):
    """A tiny model pruned at a place, and the report."""
    model = tiny.make_model(name, dtype=dtype).to(place)
    return model, prune_model(model, config, WINDOWS)


def masks(model):
    return torch.cat([layer.mask().flatten().cpu() for layer in packed_layers(model).values()])


@torch.no_grad()
def logits(model):
    ids = tiny.make_windows(2, 16, seed=9)
    return model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu()


def assert_alike(found, expected, share):
    """The layers of two reports lose about the same; ways that choose by small differences may part."""
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for own, other in zip(found.layers, expected.layers, strict=True):
        assert own.certificate.legal
        assert own.relative_error == pytest.approx(other.relative_error, rel=share, abs=1e-4), own.name
        if own.min_degree:
            assert own.certificate.floors[own.band] >= own.min_degree


@pytest.mark.parametrize("preset", PRESETS)
def test_pruning_by_every_preset(preset, device):
    config = configured(preset)
    model, report = pruned("llama", config, device)
    own, expected = pruned("llama", config, "cpu")
    assert all(layer.weight.device == layer.weight_meta.device == device for layer in packed_layers(model).values())
    assert_alike(report, expected, share=0.1)
    agree = float((masks(model) == masks(own)).float().mean())
    assert agree > (0.99 if config.solver == "score" and not config.permutation else 0.9)
    assert len(report.tuning) == (2 if config.block_tuning else 0)
    torch.testing.assert_close(logits(copy.deepcopy(model).cpu()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tuning_blocks(name, device):
    config = configured("magnitude", block_tuning=STEPS, tuning_lr=1e-3, batch_size=2)
    model, report = pruned(name, config, device)
    _, expected = pruned(name, config, "cpu")
    for own, other in zip(report.tuning, expected.tuning, strict=True):
        assert own.kept
        assert own.error_after < own.error_before
        assert own.error_before == pytest.approx(other.error_before, rel=0.1)
        assert own.error_after == pytest.approx(other.error_after, rel=0.1)
    assert all(bool((layer.dense_weight()[~layer.mask()] == 0).all()) for layer in packed_layers(model).values())


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "phi3", "gpt_neox", "bert"])
def test_pruning_other_architectures(name, device):
    model, report = pruned(name, configured(permutation=True), device)
    own, expected = pruned(name, configured(permutation=True), "cpu")
    assert_alike(report, expected, share=0.1)
    assert float((masks(model) == masks(own)).float().mean()) > 0.9


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_pruning_mixtures_of_experts(name, device):
    model, report = pruned(name, configured(min_expert_tokens=4), device)
    _, expected = pruned(name, configured(min_expert_tokens=4), "cpu")
    assert_alike(report, expected, share=0.1)
    torch.testing.assert_close(logits(copy.deepcopy(model).cpu()), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["fast", "best"])
def test_pruning_in_half_precision(preset, dtype, device):
    model, report = pruned("llama", configured(preset), device, dtype)
    _, expected = pruned("llama", configured(preset), "cpu", dtype)
    assert {layer.weight.dtype for layer in packed_layers(model).values()} == {dtype}
    assert_alike(report, expected, share=0.2)


def test_hidden_states_in_the_memory_of_the_host(device):
    values, held = [gaussian(64, 512, 512, seed=seed).to(device) for seed in range(2)], StatesOnHost()
    for value in values:
        held.append(value * 1)  # freed at once, while the copy may still be on its way
    for _ in range(3):  # what is read is written again before anyone waits for the device
        for at in range(2):
            held[at] = held[at] * 2
    assert all(torch.equal(held[at], value * 8) for at, value in enumerate(values))
    assert held[0].device == device
    assert held._kept[0][0].is_pinned() == (device.type == "cuda")


def test_where_hidden_states_are_makes_no_difference(device, monkeypatch):
    found = []
    for free in (2**40, 0):
        monkeypatch.setattr(states, "free_bytes", lambda place, free=free: free)
        found.append(pruned("llama", configured(), device, torch.bfloat16)[0].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_is_free_on_the_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: of a CPU nothing is asked")
    before = states.free_bytes(device)
    taken = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - states.free_bytes(device) == pytest.approx(2**28, rel=0.1)
    del taken
    assert states.free_bytes(device) == pytest.approx(before, rel=0.01)


def test_memory_of_the_gpu_is_in_the_report(device):
    _, report = pruned("llama", configured(), device)
    assert ("peak_cuda" in report.measurements) == (device.type == "cuda")
    assert report.measurements.get("peak_cuda", 1) > 0
    stages = report.measurements["stages"]
    assert sum(stage["seconds"] for stage in stages.values()) <= report.measurements["seconds"]


def test_saving_and_loading(device, dense_folder, text_file, tmp_path):
    pruner = EGGSPruner.from_pretrained(dense_folder, device_map=str(device))
    pruner.prune(configured(), calibration=text_file)
    pruner.save_pretrained(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").ok
    expected = logits(pruner.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=str(device))
    assert torch.equal(logits(again), expected)
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(on_cpu), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.dequantize()), expected, rtol=1e-4, atol=1e-4)


def test_pruning_on_load(device, dense_folder, text_file):
    config = configured(calibration=str(text_file))
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config, device_map=str(device))
    own = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    assert {layer.weight.device for layer in packed_layers(model).values()} == {device}
    assert float((masks(model) == masks(own)).float().mean()) > 0.99
    torch.testing.assert_close(logits(model), logits(own), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_block_by_block(preset, device, dense_folder, text_file, tmp_path):
    config = configured(preset, calibration=str(text_file))
    outputs = {"cpu": tmp_path / "out", str(device): tmp_path / "out of the device"}
    reports = {
        place: prune_checkpoint(dense_folder, output, config, device=place, progress=False)
        for place, output in outputs.items()
    }
    assert_alike(reports[str(device)], reports["cpu"], share=0.1)
    assert inspect_checkpoint(outputs[str(device)]).ok


def test_writing_tokens(device, packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder, device_map=str(device))
    start = torch.arange(4, 12, device=device)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(start, **options)
    assert written.shape == (1, 16)
    assert torch.equal(written, model.dequantize().generate(start, **options))


def test_judging(device, packed_folder):
    found = [
        perplexity(AutoModelForCausalLM.from_pretrained(packed_folder, device_map=place), WINDOWS, progress=False)
        for place in ("cpu", str(device))
    ]
    assert found[1].perplexity == pytest.approx(found[0].perplexity, rel=1e-4)
    assert found[1].tokens == found[0].tokens


@pytest.mark.parametrize("half", [False, True])
def test_training_the_packed_values(half, device, packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder, device_map=str(device)).train()
    before = masks(model)
    for layer in packed_layers(model).values():
        layer.weight.requires_grad_()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    ids, losses = WINDOWS.to(device), []
    for _ in range(10):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(masks(model), before)


@pytest.mark.parametrize("method", ["lora", "values"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recovery(method, device, packed_folder, dense_folder, text_file, tmp_path):
    pytest.importorskip("peft")
    from optimum_eggs.recovery.recover import RecoverySettings, recover

    settings = RecoverySettings(
        [str(text_file)], method=method, teacher=str(dense_folder), seq_len=16, batch_size=2, steps=4, evaluations=2
    )
    report = recover(packed_folder, tmp_path / "out", settings)
    assert report.steps == 4
    assert inspect_checkpoint(tmp_path / "out").ok
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (packed_folder, tmp_path / "out"))
    assert torch.equal(masks(before), masks(after))
    assert not torch.equal(logits(before), logits(after))


def test_a_model_on_two_gpus(second_device, dense_folder, text_file):
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 0}
    places |= {"model.layers.0": 0, "model.layers.1": second_device.index}
    pruner = EGGSPruner.from_pretrained(dense_folder, device_map=places)
    report = pruner.prune(configured("best"), calibration=text_file)
    alone = EGGSPruner.from_pretrained(dense_folder)
    assert_alike(report, alone.prune(configured("best"), calibration=text_file), share=0.1)
    assert packed_layers(pruner.model)["model.layers.1.mlp.up_proj"].weight.device == second_device
    torch.testing.assert_close(logits(pruner.model), logits(alone.model), rtol=0.1, atol=0.1)
