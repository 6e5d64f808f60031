import pytest
import tiny
from oracles import loop_floor

from optimum_eggs import EGGSConfig, NMLinear
from optimum_eggs.engine import prune_model
from optimum_eggs.engine.floor import NO_FLOOR, Floor, strongest_floor
from optimum_eggs.pattern import NMPattern

WINDOWS = tiny.make_windows(8, 16)


@pytest.mark.parametrize(
    ("cost", "tolerance", "expected"),
    [
        ({4: 0.001, 8: 0.001, 16: 0.001, 32: 0.0, 64: 0.0}, 0.005, Floor(1, 4)),
        ({4: 0.1, 8: 0.02, 16: 0.005, 32: 0.0, 64: 0.0}, 0.005, Floor(1, 16)),
        ({4: 0.1, 8: 0.02, 16: 0.0051, 32: 0.001, 64: 0.0}, 0.005, Floor(1, 32)),
        ({4: 0.1, 8: 0.1, 16: 0.1, 32: 0.1, 64: 0.1}, 0.005, NO_FLOOR),
        ({4: 0.1, 8: 0.1, 16: 0.1, 32: 0.1, 64: 0.1}, 0.2, Floor(1, 4)),
        ({4: 0.0, 8: 0.0, 16: 0.0, 32: 0.0, 64: 0.0}, 0.0, Floor(1, 4)),
    ],
)
def test_the_strongest_within_the_tolerance_is_taken(cost, tolerance, expected):
    def solve(floor):
        return 1.0 if floor == NO_FLOOR else 1.0 + cost[floor.band]

    floor, solution, least = strongest_floor(solve, lambda error: error, 64, NMPattern(2, 4), tolerance)
    assert (floor, solution, least) == (expected, solve(expected), 1.0)


@pytest.mark.parametrize(
    ("rows", "pattern", "first"), [(64, (1, 8), 8), (16, (1, 16), 16), (64, (1, 2), 4), (8, (2, 4), 4)]
)
def test_only_floors_that_can_hold_are_tried(rows, pattern, first):
    tried = []

    def solve(floor):
        tried.append(floor.band)
        return 1.0 if floor == NO_FLOOR else 2.0

    strongest_floor(solve, lambda error: error, rows, NMPattern(*pattern), 0.005)
    assert tried == [NO_FLOOR.band, *(band for band in (4, 8, 16, 32, 64) if first <= band <= rows)]


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.005, 10.0])
def test_auto_keeps_the_floor_it_chose_within_the_tolerance(preset, tolerance, correction):
    model = tiny.make_model("llama")
    values = {"floor_tolerance": tolerance, "error_correction": correction, "block_tuning": 0}
    config = EGGSConfig("2:4", preset=preset, min_degree="auto", **values)
    report = prune_model(model, config, WINDOWS)
    for layer in report.layers:
        mask = model.get_submodule(layer.name).mask()
        assert isinstance(model.get_submodule(layer.name), NMLinear)
        assert layer.relative_error <= (1 + tolerance) * layer.error_without_floor * (1 + 1e-5)  # float32 sums
        assert loop_floor(mask, layer.band) >= layer.min_degree
        if tolerance == 10.0:
            assert (layer.min_degree, layer.band) == (1, 4)
    assert report.config["min_degree"] == "auto"
