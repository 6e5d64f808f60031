"""`EGGSConfig`: everything that decides how a model is pruned."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError
from .importance import IMPORTANCE
from .packing import FORMAT_VERSION
from .pattern import NMPattern
from .presets import PRESETS, preset

QUANT_METHOD = "eggs"
SELECTIONS = ("optimal", "diagonal", "none")
UPDATES = ("refit", "none")
SAMPLINGS = ("random", "sequential")
_METHOD_FIELDS = (
    "importance",
    "exponent",
    "selection",
    "min_degree",
    "band",
    "weight_update",
    "refit_steps",
    "damping",
)


class EGGSConfig(QuantizationConfigMixin):
    """How to prune a model to N:M sparsity.

    Args:
        pattern: `"n:m"`, n the number **kept** of every m inputs; or pass `n` and `m`. Default `"2:4"`.
        preset: A name that stands for the values of the method: `"fast"` (the default), `"paper"`, `"ria"`, `"wanda"`,
            `"magnitude"`. What is passed besides it wins. `None` once the values are not those of a preset.
        importance: The score of a weight: `"ria"`, `"wanda"` or `"magnitude"`.
        exponent: RIA's power of the input's norm.
        selection: How the floor on the inputs' degrees is kept: `"optimal"` (the best mask there is under the floor),
            `"diagonal"` (whole wrapped diagonals of m x m tiles, as published) or `"none"`.
        min_degree: The floor: outputs that every input keeps in every `band` rows. 0 without a floor.
        band: Rows over which the floor holds. Default: 16, or four times the rows that the floor needs at least if
            that is more; m for `"diagonal"`, which knows no other.
        weight_update: What becomes of the weights that stay: `"refit"` (masked least squares) or `"none"`.
        refit_steps: Conjugate gradient steps of the refit.
        damping: Ridge of the refit, relative to the mean diagonal of the Gram matrix.
        calibration: A text file, the name of a data set (`"wikitext2"`, `"c4"` or any id on the Hub), a list of
            texts, token ids, a `datasets.Dataset`, or a mapping of files and names to the share of the windows that
            each gives. Data itself is never stored in the configuration.
        split, text_column: Where to find the text in a data set from the Hub. Default: `"train"`, `"text"`.
        num_samples, seq_len: Number of calibration windows, and tokens in each.
        sampling: `"random"` windows, or `"sequential"`: the first ones, end to end.
        seed: Seed of everything random.
        batch_size: Windows run through a block at a time.
        targets: Name patterns of the linear layers to prune. Default: all within the blocks.
        ignore: Name patterns of layers to leave dense. Default: `["lm_head"]`. A pattern is a shell-style glob on the
            dotted name; it may leave out leading and trailing parts (`"down_proj"`, `"layers.0"`, `"*.mlp.*"`).
        block_list: Name of the list of blocks (`"model.layers"`), if it cannot be found by structure.
        tokenizer: Tokenizer for the calibration text when pruning on load; by default the model's own. Not stored.
        pruned_modules: The layers pruned: name -> `"n:m"`. Written by the pruner; it is what a loader goes by.
        format_version: Version of the packed format.

    Raises:
        ConfigError: an unknown key, or a value out of its range.

    >>> config = EGGSConfig("2:4", num_samples=32, seq_len=512)
    >>> config.preset, config.selection, config.band
    ('fast', 'optimal', 16)
    >>> EGGSConfig.from_dict(config.to_dict()) == config
    True
    """

    def __init__(
        self,
        pattern: str | NMPattern | None = None,
        *,
        n: int | None = None,
        m: int | None = None,
        preset: str | None = None,
        importance: str | None = None,
        exponent: float = 0.5,
        selection: str | None = None,
        min_degree: int | None = None,
        band: int | None = None,
        weight_update: str | None = None,
        refit_steps: int = 15,
        damping: float = 0.01,
        calibration: Any = None,
        split: str | None = None,
        text_column: str | None = None,
        num_samples: int = 128,
        seq_len: int = 2048,
        sampling: str = "random",
        seed: int = 0,
        batch_size: int = 4,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = ("lm_head",),
        block_list: str | None = None,
        tokenizer: Any = None,
        pruned_modules: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method={quant_method!r} is not this package's; it must be {QUANT_METHOD!r}")
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version={format_version!r} is unknown to this release, which reads version {FORMAT_VERSION}; "
                "upgrade optimum-eggs, or prune the model again"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = FORMAT_VERSION
        chosen = _pattern(pattern, n, m)
        self.n, self.m = chosen.n, chosen.m

        base = _preset_values(preset)
        self.importance = _one_of("importance", base["importance"] if importance is None else importance, IMPORTANCE)
        self.exponent = _number("exponent", exponent, least=0)
        self.selection = _one_of("selection", base["selection"] if selection is None else selection, SELECTIONS)
        self.min_degree = _min_degree(min_degree, base["min_degree"], self.selection, chosen)
        self.band = _band(band, self.min_degree, self.selection, chosen)
        update = base["weight_update"] if weight_update is None else weight_update
        self.weight_update = _one_of("weight_update", update, UPDATES)
        self.refit_steps = _integer("refit_steps", refit_steps, least=1)
        self.damping = _number("damping", damping, least=0)

        self.calibration = calibration
        self.split = _text("split", split)
        self.text_column = _text("text_column", text_column)
        self.num_samples = _integer("num_samples", num_samples, least=1)
        self.seq_len = _integer("seq_len", seq_len, least=2)
        self.sampling = _one_of("sampling", sampling, SAMPLINGS)
        self.seed = _integer("seed", seed, least=0)
        self.batch_size = _integer("batch_size", batch_size, least=1)

        self.targets = _names("targets", targets)
        self.ignore = _names("ignore", ignore) or []
        self.block_list = _text("block_list", block_list)
        self.tokenizer = tokenizer
        self.pruned_modules = _pruned_modules(pruned_modules)
        self.preset = self._matching_preset(preset)

    @property
    def pattern(self) -> NMPattern:
        """The pattern asked for, n kept of every m."""
        return NMPattern(self.n, self.m)

    def _matching_preset(self, asked: str | None) -> str | None:
        """The preset that stands for the values held, `asked` first."""
        names = list(PRESETS) if asked is None else [asked, *PRESETS]
        values = {field: getattr(self, field) for field in _METHOD_FIELDS}
        for name in names:
            base = preset(name)
            full = {"exponent": 0.5, "refit_steps": 15, "damping": 0.01} | base
            full["band"] = _band(None, base["min_degree"], base["selection"], self.pattern)
            if full == values:
                return name
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types. Data and tokenizer are left out: `calibration` stays only where it names its sources."""
        fields = {key: value for key, value in self.__dict__.items() if key != "tokenizer"}
        fields["calibration"] = _calibration_names(self.calibration)
        return copy.deepcopy(fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EGGSConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> EGGSConfig:
        # transformers copies the configuration on the way in; data and tokenizer are shared, not copied.
        twin = copy.copy(self)
        for name in ("targets", "ignore", "pruned_modules"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        return twin


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    if not unknown:
        return
    known = [name for name in inspect.signature(EGGSConfig).parameters if name != "unknown"]
    key = next(iter(unknown))
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {known}"
    raise ConfigError(f"{key}={unknown[key]!r}: EGGSConfig has no such key; {hint}")


def _pattern(pattern: str | NMPattern | None, n: int | None, m: int | None) -> NMPattern:
    if n is None and m is None:
        return NMPattern.parse("2:4" if pattern is None else pattern)
    if n is None or m is None:
        raise ConfigError(f"n={n!r}, m={m!r}: both are needed; write n=2, m=4 or pattern='2:4'")
    chosen = NMPattern(n, m)
    if pattern is not None and NMPattern.parse(pattern) != chosen:
        raise ConfigError(f"pattern={pattern!r} contradicts n={n}, m={m}; pass one of the two")
    return chosen


def _preset_values(name: str | None) -> dict[str, Any]:
    return preset("fast" if name is None else name)


def _min_degree(given: int | None, of_preset: int, selection: str, pattern: NMPattern) -> int:
    if selection == "none":
        if given:
            raise ConfigError(
                f"min_degree={given} with selection='none': nothing would keep that floor; use selection='optimal', or "
                "min_degree=0"
            )
        return 0
    degree = _integer("min_degree", (of_preset or 1) if given is None else given, least=0)
    if selection == "diagonal" and degree > pattern.n:
        raise ConfigError(
            f"min_degree={degree} with selection='diagonal' at {pattern}: a row keeps one weight of each diagonal, so "
            f"use {pattern.n} or less"
        )
    return degree


def _band(given: int | None, min_degree: int, selection: str, pattern: NMPattern) -> int:
    if selection == "diagonal":
        if given not in (None, pattern.m):
            raise ConfigError(
                f"band={given} with selection='diagonal': diagonals live in tiles of m={pattern.m} rows; leave `band` "
                "out, or use selection='optimal'"
            )
        return pattern.m
    need = -(-min_degree * pattern.m // pattern.n)
    band = max(16, 4 * need) if given is None else _integer("band", given, least=1)
    if band < need:
        raise ConfigError(
            f"band={band} with min_degree={min_degree} at {pattern}: {band} rows keep {band * pattern.n} weights a "
            f"group and the floor takes {min_degree * pattern.m}; use a band of {need} or more, or a smaller min_degree"
        )
    return band


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    return value


def _number(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ConfigError(f"{name}={value!r} must be a finite number of at least {least}")
    return float(value)


def _text(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name}={value!r} must be a text that is not empty, or None")
    return value


def _one_of(name: str, value: Any, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {list(allowed)}")
    return value


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    items = list(value) if listed else []
    if not listed or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"{name}={value!r} must be a list of name patterns; write for example {name}=['down_proj']")
    return items


def _pruned_modules(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"pruned_modules={value!r} must map the names of layers to patterns such as '2:4'")
    return {name: str(NMPattern.parse(pattern)) for name, pattern in value.items()}


def _calibration_names(source: Any) -> str | dict[str, float] | None:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Mapping) and all(
        isinstance(name, str | Path) and isinstance(share, int | float) for name, share in source.items()
    ):
        return {str(name): float(share) for name, share in source.items()}
    return None
