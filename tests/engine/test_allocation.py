import itertools

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.engine import prune_model
from optimum_eggs.engine.allocation import allocate
from optimum_eggs.errors import ConfigError
from optimum_eggs.pattern import NMPattern

WINDOWS = tiny.make_windows(8, 16)


def test_with_falling_returns_and_equal_sizes_greedy_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        drops = torch.rand(4, 2, generator=generator).sort(1, descending=True).values.tolist()
        errors = {f"layer {i}": {1: first + second, 2: second, 3: 0.0} for i, (first, second) in enumerate(drops)}
        chosen = allocate(errors, dict.fromkeys(errors, 64), NMPattern(2, 4))
        found = sum(errors[name][pattern.n] for name, pattern in chosen.items())
        best = min(
            sum(errors[name][n] for name, n in zip(errors, choice, strict=True))
            for choice in itertools.product((1, 2, 3), repeat=4)
            if sum(choice) <= 8
        )
        assert found == pytest.approx(best, rel=1e-12)


def test_a_layer_that_no_longer_fits_does_not_stop_a_smaller_one():
    errors = {"large": {1: 9.0, 2: 0.5, 3: 0.0}, "small": {1: 0.3, 2: 0.2, 3: 0.1}}
    chosen = allocate(errors, {"large": 100, "small": 10}, NMPattern(2, 4))
    assert {name: str(pattern) for name, pattern in chosen.items()} == {"large": "2:4", "small": "2:4"}
    chosen = allocate(errors, {"large": 100, "small": 60}, NMPattern(2, 4))
    assert {name: str(pattern) for name, pattern in chosen.items()} == {"large": "2:4", "small": "2:4"}


@pytest.mark.parametrize(("pattern", "least", "most"), [("2:4", 1, 3), ("4:8", 2, 6), ("1:4", 1, 1), ("6:8", 3, 7)])
def test_the_choices_lie_around_the_average(pattern, least, most):
    choices = NMPattern.parse(pattern).allocations()
    assert [choice.n for choice in choices] == list(range(least, most + 1))


@pytest.mark.parametrize("preset", ["fast", "alps"])
def test_the_budget_is_kept_and_the_error_falls(preset):
    reports = {}
    for allocation in ("uniform", "error"):
        model = tiny.make_model("llama")
        model.model.layers[0].mlp.down_proj.weight.data[:, ::4] *= 50  # a layer that needs less than others
        reports[allocation] = prune_model(model, EGGSConfig("4:8", preset=preset, allocation=allocation), WINDOWS)
        layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
        assert sum(layer.weight.numel() for layer in layers) <= sum(
            layer.in_features * layer.out_features // 2 for layer in layers
        )
    assert len({layer.pattern for layer in reports["error"].layers}) > 1
    assert reports["error"].mean_relative_error < reports["uniform"].mean_relative_error


def test_mixed_patterns_are_saved_and_loaded(tmp_path, dense_folder, text_file):
    pruner = EGGSPruner.from_pretrained(dense_folder)
    config = EGGSConfig("4:8", num_samples=8, seq_len=16, band=16, allocation="error")
    report = pruner.prune(config, calibration=text_file)
    pruner.save_pretrained(tmp_path / "packed")
    loaded = EGGSPruner.from_pretrained(tmp_path / "packed").model
    patterns = {layer.name: layer.pattern for layer in report.layers}
    assert len(set(patterns.values())) > 1
    for name, pattern in patterns.items():
        assert str(loaded.get_submodule(name).pattern) == pattern
    windows = tiny.make_windows(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=windows).logits, pruner.model(input_ids=windows).logits)


def test_the_layer_with_least_must_be_able_to_keep_the_floor():
    EGGSConfig("2:4", min_degree=4, band=8)
    with pytest.raises(ConfigError, match=r"band=8 with min_degree=4 at 1:4: .* use a band of 16 or more"):
        EGGSConfig("2:4", min_degree=4, band=8, allocation="error")


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "3:4", "7:8"])
def test_a_pattern_without_a_choice_on_both_sides_is_refused(pattern):
    with pytest.raises(
        ConfigError, match=rf"allocation='error' at {pattern}: no layer could have more and another less"
    ):
        EGGSConfig(pattern, allocation="error")


def test_whole_diagonals_need_a_row_that_is_wide_enough():
    with pytest.raises(ConfigError, match=r"min_degree=2 with selection='diagonal' at 1:4: .* use 1 or less"):
        EGGSConfig("2:4", preset="paper", min_degree=2, allocation="error")
