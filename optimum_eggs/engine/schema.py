"""What `report.json` holds, of what kind: all that this package reads of it again.

What is not named here is written for people, and may be anything. What earlier releases did not write may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ConfigError, shorten
from ..pattern import NMPattern

_MOST = 1e306  # an axis for more cannot be drawn; perplexities are no more than exp(700)
Check = Callable[[Any, str], str | None]
"""From a value and its place in the report: what is wrong with it, as a message, or None."""


def problem(report: Any) -> str | None:
    """The first thing in a report that is not of its kind, as a message without the file's name; None if all is.

    >>> problem({"evaluations": [{"dataset": "c4", "conditions": "", "metrics": {"perplexity": "abc"}}]})
    "evaluations[0].metrics.perplexity is 'abc', where a report has a number"
    >>> problem({"evaluations": [{}]}), problem([])
    ('evaluations[0] lacks dataset', 'holds [], no report')
    """
    if not isinstance(report, dict):
        return f"holds {shorten(report)}, no report"
    return (_PRUNED if "layers" in report else _OTHER)(report, "")


def _kind(name: str, holds: Callable[[Any], bool]) -> Check:
    """A single value, by what it is called and whether one is of it."""

    def check(value: Any, where: str) -> str | None:
        return None if holds(value) else f"{where} is {shorten(value)}, where a report has {name}"

    return check


def _maybe(of: Check) -> Check:
    """Null, or what `of` asks for."""
    return lambda value, where: None if value is None else of(value, where)


def _or_empty(of: Check) -> Check:
    """Null or an empty object, or what `of` asks for."""
    return lambda value, where: None if value is None or value == {} else of(value, where)


def _each(of: Check) -> Check:
    """An object of any keys, each value as `of` asks for."""

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, dict):
            return _OBJECT(value, where)
        return _first(of(part, f"{where}.{key}") for key, part in value.items())

    return check


def _list(of: Check, least: int = 0) -> Check:
    """A list of at least that many entries, each as `of` asks for."""

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, list) or len(value) < least:
            return f"{where} is {shorten(value)}, where a report has a list{' that is not empty' * bool(least)}"
        return _first(of(part, f"{where}[{index}]") for index, part in enumerate(value))

    return check


def _object(needed: dict[str, Check], others: dict[str, Check]) -> Check:
    """An object with all keys of `needed`, and with those of `others` that it has, each value as asked for."""

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, dict):
            return _OBJECT(value, where)
        lacking = next((key for key in needed if key not in value), None)
        if lacking is not None:
            return f"{where} lacks {lacking}".lstrip()
        parts = ((key, of) for key, of in (needed | others).items() if key in value)
        return _first(of(value[key], f"{where}.{key}".lstrip(".")) for key, of in parts)

    return check


def _first(found: Iterable[str | None]) -> str | None:
    return next((each for each in found if each is not None), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= _MOST


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(NMPattern.parse(value))
    except ConfigError:
        return False


def _is_tile(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(row, str) and row for row in value):
        return False
    return len({len(row) for row in value}) == 1 and set("".join(value)) <= {"0", "1"}


def _is_source(value: Any) -> bool:
    """One name, or several, which may have shares; of data in memory there is none."""
    names = value if isinstance(value, list | dict) else [value]
    return all(name is None or _is_text(name) for name in names)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


_OBJECT = _kind("an object", lambda value: isinstance(value, dict))
_TEXT = _kind("a text", _is_text)
_NUMBER = _kind("a number", _is_number)
_ERROR = _kind("a number that is not negative", lambda value: _is_number(value) and value >= 0)
_INTEGER = _kind("an integer", _is_integer)
_COUNT = _kind("an integer that is not negative", lambda value: _is_integer(value) and value >= 0)
_SIZE = _kind("a positive integer", lambda value: _is_integer(value) and value > 0)
_PATTERN = _kind("a pattern such as '2:4'", _is_pattern)
_SOURCE = _kind("names of texts", _is_source)
_TILE = _kind("rows of 0 and 1, all of one length", _is_tile)

_TEXTS = _list(_object({}, {"name": _maybe(_TEXT), "split": _maybe(_TEXT), "sha256": _maybe(_TEXT)}))
_ESTIMATE = _object({"value": _NUMBER, "low": _maybe(_NUMBER), "high": _maybe(_NUMBER)}, {})
_SCORES = _each(_object({"value": _NUMBER, "stderr": _maybe(_ERROR)}, {}))
_SPECTRA = {"sigma2": _NUMBER, "sigma2_weighted": _NUMBER}
_CERTIFICATE = _object(
    {
        "input_degree_min": _COUNT,
        "input_degree_mean": _NUMBER,
        "input_degree_cv": _NUMBER,
        "floors": _each(_COUNT),
    },
    _SPECTRA,
)
_SCORES_ALONE = _object(
    {
        "input_degree_min": _COUNT,
        "input_degree_cv": _NUMBER,
        "starved_inputs": _COUNT,
        "short": _COUNT,
        "pairs": _SIZE,
        "row": _COUNT,
        "column": _COUNT,
        "tile": _TILE,
    },
    {},
)
_LAYER = _object(
    {
        "name": _TEXT,
        "block": _INTEGER,
        "out_features": _SIZE,
        "in_features": _SIZE,
        "pattern": _PATTERN,
        "relative_error": _maybe(_NUMBER),
        "certificate": _CERTIFICATE,
    },
    {
        "min_degree": _COUNT,
        "band": _SIZE,
        "coding": _maybe(_TEXT),
        "scores_alone": _or_empty(_SCORES_ALONE),
        "spectra": _or_empty(_object(_SPECTRA, {})),
    },
)
_EVALUATION = _object(
    {"dataset": _TEXT, "conditions": _TEXT, "metrics": _each(_NUMBER)},
    {
        "split": _maybe(_TEXT),
        "text_sha256": _maybe(_TEXT),
        "dense": _each(_NUMBER),
        "comparison": _object({}, {"kl_divergence": _ESTIMATE, "top1_agreement": _ESTIMATE}),
    },
)
_TASK = _object({"task": _TEXT, "version": _TEXT, "conditions": _TEXT, "metrics": _SCORES}, {"dense": _SCORES})
_TUNED = _object({"block": _INTEGER, "error_before": _NUMBER, "error_after": _NUMBER}, {})
_STAGE = _object({"seconds": _NUMBER, "peak_rss": _NUMBER}, {})
_BENCHMARK = _object(
    {
        "machine": _object({"processor": _TEXT, "threads": _COUNT}, {"accelerator": _maybe(_TEXT)}),
        "models": _list(_object({"decode_speed": _NUMBER, "prefill_speed": _NUMBER}, {}), least=1),
    },
    {
        "prompt": _SIZE,
        "new_tokens": _SIZE,
        "dtype": _TEXT,
        "layers": _list(
            _object({"out_features": _SIZE, "in_features": _SIZE, "tokens": _SIZE, "ratio": _NUMBER}, {}),
        ),
    },
)
_RECOVERY = _object(
    {
        "settings": _object(
            {"method": _TEXT, "seq_len": _SIZE}, {"train": _SOURCE, "teacher": _maybe(_TEXT), "kd_ratio": _NUMBER}
        ),
        "steps": _COUNT,
        "windows": _COUNT,
        "windows_held_out": _COUNT,
        "perplexity_before": _maybe(_NUMBER),
        "perplexity_after": _maybe(_NUMBER),
    },
    {
        "kept": _TEXT,
        "texts": _TEXTS,
        "measurements": _object({}, {"seconds": _NUMBER}),
    },
)
_QUANTIZATION = _object(
    {"values": _maybe(_TEXT), "head": _maybe(_TEXT)},
    {
        "ignored": _maybe(_TEXT),
        "value_group": _maybe(_SIZE),
        "rounding": _maybe(_TEXT),
        "rounding_tuning": _COUNT,
        "calibration": _or_empty(
            _object({"windows": _COUNT, "seq_len": _COUNT, "sha256": _TEXT}, {"source": _SOURCE, "texts": _TEXTS})
        ),
    },
)
_PARTS: dict[str, Check] = {
    "summary": _object(
        {"pattern": _PATTERN, "layers_pruned": _COUNT, "parameters_pruned": _COUNT, "starved_inputs": _COUNT},
        {"zeros_kept": _COUNT, "layers_by_weights_alone": _COUNT},
    ),
    "config": _object({}, {"calibration": _SOURCE, "preset": _maybe(_TEXT), "min_expert_tokens": _maybe(_COUNT)}),
    "layers": _list(_LAYER, least=1),
    "calibration": _or_empty(  # of a model that was packed as it was
        _object({"windows": _COUNT, "seq_len": _COUNT, "sha256": _TEXT}, {"texts": _TEXTS, "generated": _COUNT})
    ),
}
"""Those of every pruning."""

_OTHERS: dict[str, Check] = {
    "base_model": _or_empty(_object({}, {"id": _maybe(_TEXT)})),
    "tuning": _maybe(_list(_TUNED)),
    "rounding": _maybe(_list(_TUNED)),
    "rotation": _or_empty(_object({}, {"lost_before": _NUMBER, "lost_after": _NUMBER, "reason": _TEXT})),
    "left_dense": _maybe(_list(_object({"name": _TEXT}, {}))),
    "measurements": _or_empty(
        _object({}, {"seconds": _NUMBER, "seconds_of_earlier_runs": _NUMBER, "stages": _each(_STAGE)})
    ),
    "files": _maybe(_each(_maybe(_TEXT))),
    "evaluations": _maybe(_list(_EVALUATION)),
    "tasks": _maybe(_list(_TASK)),
    "benchmark": _or_empty(_BENCHMARK),
    "recovery": _or_empty(_RECOVERY),
    "quantization": _or_empty(_QUANTIZATION),
}
_PRUNED = _object(_PARTS, _OTHERS)
_OTHER = _object({}, {key: _maybe(of) for key, of in _PARTS.items()} | _OTHERS)
