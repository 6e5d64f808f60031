"""The presets: names for whole methods."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError

NUM_SAMPLES = 128
"""Calibration windows, where nothing else is said."""

SEQ_LEN = 512
"""Tokens in each, where nothing else is said and the model reads that many."""

METHOD: dict[str, Any] = {
    "solver": "score",
    "importance": "ria",
    "exponent": 0.5,
    "selection": "none",
    "min_degree": 0,
    "swaps": 0,
    "weight_update": "none",
    "refit_steps": 15,
    "damping": 0.01,
    "permutation": False,
    "rotation": False,
    "error_correction": 0.0,
    "block_tuning": 0,
    "tuning_lr": 0.01,
}
"""Every value that makes a method, as it is where a preset says nothing else."""

_FLOOR = {"selection": "optimal", "min_degree": 1}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": METHOD
    | _FLOOR
    | {"solver": "sparsegpt", "weight_update": "refit", "refit_steps": 10, "error_correction": 0.5},
    "best": METHOD
    | _FLOOR
    | {"permutation": True, "solver": "admm", "weight_update": "refit", "refit_steps": 10, "block_tuning": 200},
    "paper": METHOD | {"selection": "diagonal", "min_degree": 1},
    "alps": METHOD | {"solver": "admm", "weight_update": "refit", "refit_steps": 10},
    "sparsegpt": METHOD | {"solver": "sparsegpt"},
    "ria": METHOD,
    "wanda": METHOD | {"importance": "wanda"},
    "magnitude": METHOD | {"importance": "magnitude"},
}
"""Preset -> the values it stands for.

`fast`: SparseGPT under a floor of one output per band and masked refit, where every layer makes up for half of what
those before it lost. `best`: channels reordered where that folds, ADMM under that floor, masked refit, blocks tuned to
the dense model. `paper`: RIA scores and whole wrapped diagonals in m x m tiles, weights untouched. The rest are
baselines without a floor: `alps` (ADMM, masked refit), `sparsegpt`, and the scores alone.
"""


def preset(name: str) -> dict[str, Any]:
    """The values that the preset `name` stands for.

    Raises:
        ConfigError: no preset has that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r} is unknown; use one of {list(PRESETS)}")
    return dict(PRESETS[name])
