"""Calibration inputs and weights that make solvers fail: what comes out is finite, legal, and keeps the floor."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from oracles import gaussian
from problems import layer

from optimum_eggs import EGGSConfig, ranks
from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.config import PRESETS
from optimum_eggs.engine import prune_model
from optimum_eggs.engine.solve import solve_layer
from optimum_eggs.errors import NumericalError
from optimum_eggs.masks.certificate import certify
from optimum_eggs.measure import Meter
from optimum_eggs.update import Problem, relative_error

ROWS, COLUMNS, TOKENS = 32, 24, 100
PATTERN = EGGSConfig("2:4").pattern


def inputs(case):
    """Calibration inputs (tokens, in), float32."""
    x = gaussian(TOKENS, COLUMNS, seed=1)
    if case == "dead inputs":
        x[:, ::3] = 0
    elif case == "a dead group":
        x[:, 4:8] = 0
    elif case == "all inputs dead":
        x.zero_()
    elif case == "duplicate inputs":
        x[:, 1::2] = x[:, ::2]
    elif case == "fewer tokens than inputs":
        x = x[:7]
    elif case == "a single token":
        x = x[:1]
    elif case == "constant channels":
        x[:, ::4] = 5
        x[:, 2] = -3
    elif case == "all channels constant":
        x[:] = gaussian(COLUMNS, seed=2)
    elif case == "inputs of all sizes":
        x *= 10.0 ** torch.linspace(-12, 6, COLUMNS)
    elif case == "inputs below what float32 holds squared":
        x *= 1e-25
    return x


CASES = [
    "dead inputs",
    "a dead group",
    "all inputs dead",
    "duplicate inputs",
    "fewer tokens than inputs",
    "a single token",
    "constant channels",
    "all channels constant",
    "inputs of all sizes",
    "inputs below what float32 holds squared",
]
SOLVED = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "swaps": {"preset": "ria", "swaps": 2},
}


def statistics_of(x):
    statistics = GramAccumulator(x.shape[1], torch.device("cpu"))
    statistics.add(x)
    return statistics


def solve(x, weight=None, **values):
    weight = gaussian(ROWS, COLUMNS) if weight is None else weight
    config, statistics = EGGSConfig("2:4", **values), statistics_of(x)
    with Meter() as meter:
        found = solve_layer("a.layer", weight, Problem(statistics.gram, config.damping), config, meter)
    assert torch.isfinite(found.weight).all()
    assert not found.weight[~found.mask].any()
    floor = (config.band,) if config.min_degree else ()
    certificate = certify(found.mask, PATTERN, extra_bands=floor)
    assert certificate.legal
    assert all(certificate.floors[band] >= config.min_degree for band in floor)
    # Never worse than a layer that gives nothing.
    assert relative_error(weight, found.weight, statistics.gram) <= 1.001
    return found


@pytest.mark.parametrize("damping", [0.01, 0.0])
@pytest.mark.parametrize("values", SOLVED.values(), ids=SOLVED)
@pytest.mark.parametrize("case", CASES)
def test_every_solver_on_every_case(case, values, damping):
    solve(inputs(case), **values, damping=damping)


@pytest.mark.parametrize("values", SOLVED.values(), ids=SOLVED)
def test_weights_of_zero(values):
    assert not solve(inputs(""), torch.zeros(ROWS, COLUMNS), **values).weight.any()
    weight = gaussian(ROWS, COLUMNS)
    weight[5], weight[:, 3] = 0, 0
    assert not solve(inputs(""), weight, **values).weight[5].any()


def test_damping_that_is_too_small_is_raised_and_the_report_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        found = solve(inputs("duplicate inputs"), preset="sparsegpt", damping=0.0)
    assert found.damping is not None
    assert 0 < found.damping <= 1e-3
    assert "a.layer: damping is raised from 0 to 1e-06" in caplog.text
    assert solve(inputs(""), preset="sparsegpt", damping=0.0).damping is None

    model = tiny.make_model("llama")
    with torch.no_grad():  # two channels of the hidden states that are the same after every norm
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = layer.post_attention_layernorm.weight[5] = 0
            layer.input_layernorm.weight[6] = layer.post_attention_layernorm.weight[6] = 0
    windows = tiny.make_windows(1, 8)  # fewer tokens than inputs
    report = prune_model(model, EGGSConfig("2:4", preset="sparsegpt", damping=0.0), windows)
    raised = [layer for layer in report.layers if layer.damping is not None]
    assert raised
    assert {layer["damping"] for layer in report.to_dict()["layers"]} == {layer.damping for layer in report.layers}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_layer_that_no_damping_helps_is_named(monkeypatch):
    def fails(*args, **kwargs):
        raise NumericalError("it cannot be solved")

    monkeypatch.setattr("optimum_eggs.engine.solve.sparsegpt", fails)
    with pytest.raises(NumericalError, match=r"a\.layer: it cannot be solved; add the layer to `ignore`"):
        solve(inputs(""), preset="sparsegpt")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("windows", [(1, 1), (1, 2), (2, 1)])
def test_a_model_calibrated_on_next_to_nothing(preset, windows):
    model = tiny.make_model("llama")
    values = {"block_tuning": 0} if preset == "best" else {}
    report = prune_model(model, EGGSConfig("2:4", preset=preset, **values), tiny.make_windows(*windows))
    assert len(report.layers) == 14
    assert torch.isfinite(model(input_ids=tiny.make_windows()).logits).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_activations_beyond_float16_name_the_layer_and_a_remedy(preset):
    model = tiny.make_model("llama", dtype=torch.float16)
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(6e4)
    values = {"block_tuning": 0} if preset == "best" else {}
    with pytest.raises(NumericalError, match=r"model\.layers\.\d\.\S+: its calibration inputs hold NaN .* wider dtype"):
        prune_model(model, EGGSConfig("2:4", preset=preset, **values), tiny.make_windows())
    model = tiny.make_model("llama").float()
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(6e4)
    assert prune_model(model, EGGSConfig("2:4", preset=preset, **values), tiny.make_windows()).layers


@pytest.mark.parametrize("left", [False, True], ids=["told of", "left"])
def test_what_fails_in_another_process_is_tried_again_by_all_unless_that_has_ended(left, monkeypatch):
    weight, gram = layer("correlated", dtype=torch.float32)
    config, error = EGGSConfig("2:4", preset="fast", band=8), NumericalError("no solution there")
    # asked for in what is tried again: for the factor, for its inverse, and at the end
    answers = [error if left else ranks._Told(error), None, None, None]
    monkeypatch.setattr(
        ranks.Ranks, "gather", lambda self, value: [value, *(answers.pop(0) for _ in range(self.size - 1))]
    )
    monkeypatch.setattr(ranks.Ranks, "copy_from", lambda self, rank, *tensors: None)
    both = ranks.Ranks(0, 2)
    own = both.rows(len(weight), config.band)[0]
    with Meter() as meter:
        if left:
            with pytest.raises(NumericalError, match="no solution there"), both.together():
                solve_layer("a.layer", weight, Problem(gram, 0.01), config, meter, own, both)
            assert len(answers) == 3  # the other is gone, and is not asked again
        else:
            found = solve_layer("a.layer", weight, Problem(gram, 0.01), config, meter, own, both)
            alone = solve_layer("a.layer", weight, Problem(gram, 0.1), config, meter)
            assert found.damping == 0.1
            assert torch.equal(found.mask, alone.mask[own])
            torch.testing.assert_close(found.weight, alone.weight[own])
            assert not answers
