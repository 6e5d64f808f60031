from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, NMLinear
from optimum_eggs.calibration import find_block_list
from optimum_eggs.engine import prune_model
from optimum_eggs.errors import CalibrationError, NumericalError
from optimum_eggs.masks import topn_mask
from optimum_eggs.nn import dense_weight, is_dense_linear
from optimum_eggs.nn.experts import split_experts
from optimum_eggs.presets import PRESETS

WINDOWS = tiny.make_windows(8, 16)


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLinear)}


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture(name, dtype, config):
    model = tiny.make_model(name, dtype=dtype)
    block_list = find_block_list(model).name
    split = tiny.make_model(name, dtype=dtype)
    split_experts(split)
    expected = {n for n, layer in split.named_modules() if is_dense_linear(layer) and n.startswith(block_list)}
    report = prune_model(model, config, WINDOWS)
    layers = packed(model)
    assert set(layers) == expected == {layer.name for layer in report.layers}
    for layer in report.layers:
        assert layer.certificate.legal
        assert layer.certificate.floors[8] >= 1
        assert 0 < layer.relative_error < 0.7
        assert layers[layer.name].weight.dtype == dtype
    assert torch.isfinite(model(input_ids=WINDOWS).logits).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "6:8", "1:2"])
def test_every_preset_and_pattern(preset, pattern):
    model = tiny.make_model("llama")
    before = {name: dense_weight(layer).clone() for name, layer in model.named_modules() if is_dense_linear(layer)}
    config = EGGSConfig(pattern, preset=preset)
    report = prune_model(model, config, WINDOWS)
    for name, layer in packed(model).items():
        weight, mask = layer.dense_weight(), layer.mask()
        assert (mask.unflatten(1, (-1, layer.pattern.m)).sum(-1) == layer.pattern.n).all()
        if config.solver == "score" and config.weight_update == "none":
            assert torch.equal(weight, before[name] * mask)
        if preset == "magnitude":
            assert torch.equal(mask, topn_mask(before[name].abs(), layer.pattern))
    if preset == "paper":
        assert all(layer.certificate.floors[int(pattern[2])] >= 1 for layer in report.layers)


def test_refit_lowers_the_error_and_the_floor_costs_little():
    errors = {}
    for preset in ("ria", "fast", "paper"):
        report = prune_model(tiny.make_model("llama"), EGGSConfig("2:4", preset=preset), WINDOWS)
        errors[preset] = report.mean_relative_error
    assert errors["fast"] < errors["ria"] < errors["paper"]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_blocks_see_the_inputs_that_pruned_blocks_give(share, config):
    model, twin = tiny.make_model("llama"), tiny.make_model("llama")
    report = prune_model(model, config.replace(error_correction=share), WINDOWS)
    inputs = []
    twin.model.layers[0] = model.model.layers[0]
    twin.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        twin(input_ids=WINDOWS)
    x = inputs[0].flatten(0, 1).double()
    before = dense_weight(twin.model.layers[1].self_attn.q_proj).double()
    if share:
        dense = tiny.make_model("llama")
        dense.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with torch.no_grad():
            dense(input_ids=WINDOWS)
        gram = x.T @ x
        gram.diagonal().add_(config.damping * gram.diagonal().mean())
        drift = (inputs[1].flatten(0, 1).double() - x).T @ x
        before = before + share * torch.linalg.solve(gram, before @ drift, left=False)
    after = model.model.layers[1].self_attn.q_proj.dense_weight().double()
    expected = ((x @ (before - after).T) ** 2).sum() / ((x @ before.T) ** 2).sum()
    reported = next(layer for layer in report.layers if layer.name == "model.layers.1.self_attn.q_proj")
    assert reported.relative_error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("values", [{}, {"preset": "alps"}, {"preset": "ria", "weight_update": "refit"}])
def test_error_correction_brings_the_output_nearer_to_the_dense_model(values):
    windows = tiny.make_windows(32, 16)
    with torch.no_grad():
        dense = tiny.make_model("llama")(input_ids=windows, output_hidden_states=True).hidden_states[-1]
    lost = {}
    for share in (0.0, 1.0):
        model = tiny.make_model("llama")
        prune_model(model, EGGSConfig("2:4", **values, error_correction=share), windows)
        with torch.no_grad():
            pruned = model(input_ids=windows, output_hidden_states=True).hidden_states[-1]
        lost[share] = float((pruned - dense).square().sum())
    assert lost[1.0] < lost[0.0]


@pytest.mark.parametrize(
    "targets", [["layers.0.self_attn.q_proj"], ["layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"]]
)
def test_the_first_layers_have_nothing_to_correct(targets):
    results = []
    for share in (0.0, 1.0):
        model = tiny.make_model("llama")
        prune_model(model, EGGSConfig("2:4", targets=targets, error_correction=share), WINDOWS)
        results.append([layer.dense_weight() for layer in packed(model).values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_report_says_it_all_in_json(config):
    model = tiny.make_model("mixtral")
    report = json.loads(json.dumps(prune_model(model, config, WINDOWS).to_dict()))
    assert report["config"]["pruned_modules"] == dict.fromkeys(packed(model), "2:4")
    assert report["summary"]["layers_pruned"] == len(report["layers"]) == 24
    assert report["calibration"]["windows"] == 8
    assert report["versions"]["torch"] == version("torch")
    assert any("gate" in layer["name"] for layer in report["left_dense"])
    stages = report["measurements"]["stages"]
    assert {"forward", "statistics", "update", "pack", "report"} <= set(stages)
    assert sum(stage["seconds"] for stage in stages.values()) <= report["measurements"]["seconds"]


def test_the_batch_size_changes_nothing_but_rounding():
    masks = []
    for batch_size in (1, 3, 8):
        model = tiny.make_model("llama")
        prune_model(model, EGGSConfig("2:4", preset="ria", batch_size=batch_size), WINDOWS)
        masks.append(torch.cat([layer.mask().flatten() for layer in packed(model).values()]))
    assert all((mask == masks[0]).float().mean() > 0.999 for mask in masks)


def test_dense_layers_are_let_go(config):
    import gc
    import weakref

    model = tiny.make_model("llama")
    dense = [weakref.ref(layer) for layer in model.modules() if type(layer) is torch.nn.Linear]
    prune_model(model, config, WINDOWS)
    gc.collect()
    assert sum(layer() is not None for layer in dense) == 1  # the head


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_mode_and_cache_are_put_back(name, config):
    model = tiny.make_model(name).train()
    model.model.norm.eval()
    prune_model(model, config, WINDOWS)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
    assert model.config.use_cache is True


def test_layers_that_the_text_does_not_reach_are_left_dense_and_named(config, caplog):
    model = tiny.make_model("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(32, 32)
    report = prune_model(model, config, WINDOWS)
    assert type(model.model.layers[0].mlp.spare) is torch.nn.Linear
    left = {layer.name: layer.reason for layer in report.left_dense}
    assert "not reached by the calibration text" in left["model.layers.0.mlp.spare"]
    assert "model.layers.0.mlp.spare" not in report.config["pruned_modules"]
    assert "left dense" in caplog.text


def test_a_text_that_reaches_none_of_the_layers_asked_for_is_refused(config):
    model = tiny.make_model("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(32, 32)
    with pytest.raises(CalibrationError, match=r"nothing was pruned: model\.layers\.0\.mlp\.spare was not"):
        prune_model(model, config.replace(targets=["mlp.spare"]), WINDOWS)


def test_activations_that_are_not_finite_name_the_layer(config):
    model = tiny.make_model("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(NumericalError, match=r"model.layers.1.self_attn.q_proj: its calibration inputs hold NaN"):
        prune_model(model, config, WINDOWS)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.full((2, 8), 999), r"run from 999 to 999, and the model's vocabulary has 256; use the model's own"),
        (torch.full((2, 8), -1), r"run from -1 to -1"),
        (torch.zeros(1, 200, dtype=torch.int64), r"seq_len=200 is more than the model's context of 128 tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), r"must be \(windows, tokens\)"),
    ],
)
def test_windows_that_do_not_fit_the_model_leave_it_untouched(windows, message, config):
    model = tiny.make_model("llama")
    with pytest.raises(CalibrationError, match=message):
        prune_model(model, config, windows)
    assert not packed(model)


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_permutation_changes_neither_the_patterns_nor_what_dense_layers_compute(name, preset):
    errors = {}
    for permutation in (False, True):
        model = tiny.make_model(name)
        config = EGGSConfig("2:4", preset=preset, permutation=permutation, block_tuning=0)
        report = prune_model(model, config, WINDOWS)
        gains = [layer.permutation_gain for layer in report.layers]
        assert any(gain is not None and gain > 0 for gain in gains) == permutation
        assert all(layer.certificate.legal and layer.certificate.floors[16] >= 1 for layer in report.layers)
        folded = [layer for layer in report.layers if layer.name.endswith(("down_proj", "c_proj", "o_proj"))]
        errors[permutation] = sum(layer.relative_error for layer in folded)
    if preset == "fast":  # orders are chosen by score, and this preset's masks are too
        assert errors[True] < errors[False]


class Scaled(torch.nn.Module):
    """SiLU, and a factor near 1 for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.scale = torch.nn.Parameter(1 + 0.01 * torch.randn(channels, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.nn.functional.silu(x) * self.scale.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_order_that_would_change_the_function_by_little_is_not_folded(dtype, caplog):
    model = tiny.make_model("llama", dtype=dtype)
    for layer in model.model.layers:
        layer.mlp.act_fn = Scaled(64)
    report = prune_model(model, EGGSConfig("2:4", permutation=True), WINDOWS)
    gains = {layer.name.split(".")[-1]: layer.permutation_gain for layer in report.layers if layer.block == 0}
    assert gains["down_proj"] is None
    assert gains["o_proj"] > 0
    assert "model.layers.0.mlp.down_proj: its inputs keep their order" in caplog.text


class Routed(torch.nn.Module):
    """Experts as a list of linear layers, each token sent to one."""

    def __init__(self, experts):
        super().__init__()
        self.router = torch.nn.Linear(32, experts, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(experts))

    def forward(self, x):
        rows = x.flatten(0, -2)
        chosen = self.router(rows).argmax(-1)
        output = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                output[chosen == index] = expert(rows[chosen == index])
        return output.view_as(x)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "values", [{}, {"error_correction": 0.0}, {"preset": "best", "block_tuning": 2, "error_correction": 0.5}]
)
def test_experts_that_some_windows_do_not_reach(values, batch_size, caplog):
    torch.manual_seed(0)
    model = tiny.make_model("llama")
    for layer in model.model.layers:
        layer.mlp = Routed(16)
    reached = set()
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: reached.add(name))
        for name, module in model.named_modules()
        if name.startswith("model.layers.0.mlp.experts.")
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert 1 < len(reached) <= 16
    report = prune_model(model, EGGSConfig("2:4", targets=["experts"], batch_size=batch_size, **values), WINDOWS)
    # Block 0 reads the same in the pruned model: what its windows reach is pruned, whatever runs in the first batch.
    assert {layer.name for layer in report.layers if layer.block == 0} == reached
    assert all(layer.tokens < WINDOWS.numel() for layer in report.layers if layer.block == 0)
    corrects = values.get("error_correction", 0.5) > 0
    assert ("its error is not corrected: it gets other tokens" in caplog.text) == corrects
