"""Mixtures of experts, pruned: every expert on the tokens that it gets."""

from __future__ import annotations

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, NMLinear
from optimum_eggs.calibration import InMemoryBlocks, Walk
from optimum_eggs.engine import inputs, prune_model
from optimum_eggs.engine.plan import make_plan
from optimum_eggs.masks import topn_mask
from optimum_eggs.measure import Meter
from optimum_eggs.nn import dense_weight, is_dense_linear
from optimum_eggs.nn.experts import split_experts
from optimum_eggs.pattern import NMPattern
from optimum_eggs.ranks import Ranks
from optimum_eggs.update import relative_error

WINDOWS = tiny.make_windows(8, 16)
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def send_all_to(model, block, experts):
    """Have the router of a block prefer `experts`, whatever it reads."""
    mlp = model.model.layers[block].mlp
    router = mlp.gate if hasattr(mlp, "gate") else mlp.router
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = -1.0
        router.weight[experts, 0] = 1.0
    forward = router.forward
    router.forward = lambda hidden: forward(torch.cat([torch.ones_like(hidden[:, :1]), hidden[:, 1:]], 1))


def experts_inputs(model, block):
    """What each layer of each expert of a block reads in the dense model, (tokens, in) by name."""
    seen: dict[str, list[torch.Tensor]] = {}
    path = f"model.layers.{block}.mlp.experts"
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if name.startswith(f"{path}.") and isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for windows in WINDOWS.split(4):
            model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_is_pruned_on_the_tokens_it_gets(name):
    twin = tiny.make_model(name)
    split_experts(twin)
    seen = experts_inputs(twin, 0)
    model = tiny.make_model(name)
    # Only what reads the hidden states: nothing before it is pruned.
    values = {"preset": "wanda", "targets": ["layers.0.mlp.experts.*.gate_up_proj"]}
    report = prune_model(model, EGGSConfig("2:4", **values), WINDOWS)
    assert {layer.name for layer in report.layers} == {key for key in seen if key.endswith("gate_up_proj")}
    for layer in report.layers:
        x = seen[layer.name]
        assert layer.tokens == len(x) < WINDOWS.numel()
        assert not layer.weights_alone
        weight = dense_weight(twin.get_submodule(layer.name))
        expected = topn_mask(weight.abs() * x.norm(dim=0), NMPattern(2, 4))
        packed = model.get_submodule(layer.name)
        assert torch.equal(packed.mask(), expected)
        error = relative_error(weight, weight * expected, x.T @ x)
        assert layer.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("values", [{"preset": "fast"}, {"preset": "best", "block_tuning": 3}, {"preset": "paper"}])
@pytest.mark.parametrize("name", MIXTURES)
def test_every_layer_keeps_its_floor_whatever_it_saw(name, values):
    model = tiny.make_model(name)
    send_all_to(model, 0, [1, 2])
    report = prune_model(model, EGGSConfig("2:4", **values), WINDOWS)
    assert len(report.layers) == sum(isinstance(module, NMLinear) for module in model.modules()) == 2 * (4 + 8)
    for layer in report.layers:
        assert layer.certificate.floors[layer.band] >= layer.min_degree > 0
    idle = {layer.name: layer for layer in report.layers if "layers.0.mlp.experts.3" in layer.name}
    assert {layer.tokens for layer in idle.values()} == {0}


def test_an_expert_that_no_token_reaches_is_pruned_by_its_weights_alone():
    model, twin = tiny.make_model("mixtral"), tiny.make_model("mixtral")
    send_all_to(model, 0, [1, 2])
    split_experts(twin)
    report = prune_model(model, EGGSConfig("2:4", preset="wanda"), WINDOWS)
    alone = {layer.name for layer in report.layers if layer.weights_alone}
    assert {name for name in alone if "layers.0" in name} == {
        f"model.layers.0.mlp.experts.{expert}.{part}" for expert in (0, 3) for part in ("gate_up_proj", "down_proj")
    }
    for name in alone:
        weight = dense_weight(twin.get_submodule(name))
        expected = topn_mask(weight.abs(), NMPattern(2, 4))
        packed = model.get_submodule(name)
        assert torch.equal(packed.mask(), expected)
        assert torch.equal(packed.dense_weight(), weight * expected)
    summary = report.to_dict()["summary"]
    assert summary["layers_by_weights_alone"] == len(alone)
    rest = [layer.relative_error for layer in report.layers if not layer.weights_alone]
    assert summary["mean_relative_error"] == pytest.approx(sum(rest) / len(rest))


def test_how_many_tokens_an_expert_must_see():
    counts = {}
    for least in (0, 64, 10_000):
        report = prune_model(tiny.make_model("mixtral"), EGGSConfig("2:4", min_expert_tokens=least), WINDOWS)
        experts = [layer for layer in report.layers if "experts" in layer.name]
        assert all(layer.weights_alone == (layer.tokens < least) for layer in experts)
        assert not any(layer.weights_alone for layer in report.layers if "experts" not in layer.name)
        counts[least] = sum(layer.weights_alone for layer in experts)
    assert counts[0] == 0 < counts[64] < counts[10_000] == 16


def test_statistics_are_taken_in_as_many_passes_as_memory_asks_for(monkeypatch):
    found = []
    for limit in (2**30, 32 * 32 * 4 * 2, 1):
        monkeypatch.setattr("optimum_eggs.engine.inputs.wave_bytes", lambda device, limit=limit: limit)
        model = tiny.make_model("mixtral")
        prune_model(model, EGGSConfig("2:4", preset="fast"), WINDOWS)
        found.append({key: value for key, value in model.state_dict().items() if "experts" in key})
    assert all(torch.equal(value, other[key]) for other in found[1:] for key, value in found[0].items())


def test_a_wave_of_experts_takes_a_share_of_the_memory_that_is_free(monkeypatch):
    assert inputs.wave_bytes(torch.device("cpu")) == 2**30
    monkeypatch.setattr(inputs, "free_bytes", lambda device: 10_000 if device.type == "cuda" else None)
    assert inputs.wave_bytes(torch.device("cuda", 0)) == 2_500
    model = tiny.make_model("mixtral")
    split_experts(model)
    block = model.model.layers[0]
    todo = {f"block.{name}": module for name, module in block.named_modules() if is_dense_linear(module)}
    one = 4 * 32 * 32  # bytes of the Gram matrix of what gate and up read; that of down is four times as large
    for limit, expected in ((8 * one, [4, 2, 2]), (2 * one, [2, 2, 1, 1, 1, 1]), (0, [1] * 8)):
        waves = inputs.expert_waves(block, "block.", todo, limit)
        assert [len(wave) for wave in waves] == expected
        assert [name for wave in waves for name in wave] == [
            f"block.mlp.experts.{expert}.{part}" for part in ("gate_up_proj", "down_proj") for expert in range(4)
        ]


def test_the_processes_agree_on_the_passes(monkeypatch):
    # Each sees another amount of free memory; if one took a pass more, the others would wait for it for ever.
    asked = []
    expert_waves = inputs.expert_waves
    monkeypatch.setattr(inputs, "expert_waves", lambda *given: asked.append(given[-1]) or expert_waves(*given))
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [value, 5_000] if isinstance(value, int) else [value])
    model = tiny.make_model("mixtral")
    plan = make_plan(model, EGGSConfig("2:4"))
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, plan.block_list), WINDOWS.split(2), meter)
        next(inputs.layers_with_inputs(walk, plan.block_list.blocks[0], 0, "model.layers.0.", plan.layers[0], 0))
    assert asked == [5_000]


def test_a_gpu_is_waited_for_once_a_batch_and_not_at_every_expert(monkeypatch):
    entered = []
    stage = Meter.stage
    monkeypatch.setattr(Meter, "stage", lambda meter, name: entered.append(name) or stage(meter, name))
    model = tiny.make_model("mixtral")
    plan = make_plan(model, EGGSConfig("2:4"))
    experts = {name: module for name, module in plan.layers[0].items() if "experts" in name}
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, plan.block_list), WINDOWS.split(2), meter)
        entered.clear()
        walk.statistics_together(plan.block_list.blocks[0], 0, experts)
    assert entered.count("statistics") == len(walk.hidden)


def test_a_run_that_ends_before_the_first_block_is_done_leaves_the_experts_one_module(monkeypatch):
    model = tiny.make_model("mixtral")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_eggs.engine.prune.prune_block", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, EGGSConfig("2:4"), WINDOWS)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "_weight_conversions")
