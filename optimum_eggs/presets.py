"""The presets: names for whole methods."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"importance": "ria", "selection": "optimal", "min_degree": 1, "weight_update": "refit"},
    "paper": {"importance": "ria", "selection": "diagonal", "min_degree": 1, "weight_update": "none"},
    "ria": {"importance": "ria", "selection": "none", "min_degree": 0, "weight_update": "none"},
    "wanda": {"importance": "wanda", "selection": "none", "min_degree": 0, "weight_update": "none"},
    "magnitude": {"importance": "magnitude", "selection": "none", "min_degree": 0, "weight_update": "none"},
}
"""Preset -> the values it stands for.

`fast`: RIA scores, the optimal mask under a floor of one output per band, masked refit. `paper`: RIA scores and whole
wrapped diagonals in m x m tiles, weights untouched. `ria`, `wanda`, `magnitude`: the scores alone.
"""


def preset(name: str) -> dict[str, Any]:
    """The values that the preset `name` stands for.

    Raises:
        ConfigError: no preset has that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r} is unknown; use one of {list(PRESETS)}")
    return dict(PRESETS[name])
