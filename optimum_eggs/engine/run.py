"""From a configuration to a pruned model: draw the calibration windows, prune, and record where they came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..calibration import Windows, token_windows
from ..calibration.context import check_reads_text, context_length
from ..calibration.documents import DatasetName, described
from ..config import EGGSConfig
from ..names import hub_id, public_name
from ..presets import SEQ_LEN
from .prune import prune_model
from .report import PruneReport


def calibrate_and_prune(
    model: nn.Module, tokenizer: Any, config: EGGSConfig, calibration: Any = None, progress: bool | None = None
) -> PruneReport:
    """Prune `model` in place on windows drawn from `calibration`, or from `config.calibration`.

    The report's configuration names the source as others may know it: a file by its name without folders, data held
    in memory not at all.

    Raises:
        EGGSError: as `token_windows` and `prune_model`.
    """
    check_reads_text(model)
    source = config.calibration if calibration is None else calibration
    config = with_seq_len(config, model)
    windows = calibration_windows(source, tokenizer, config)
    report = prune_model(model, config, windows.ids, progress)
    name_sources(report, source, windows, model)
    return report


def with_seq_len(config: EGGSConfig, model: Any) -> EGGSConfig:
    """The configuration with the `seq_len` that it stands for with `model`, if none was given."""
    if config.seq_len is not None:
        return config
    settled = copy.copy(config)
    settled.seq_len = min(SEQ_LEN, context_length(model) or SEQ_LEN)
    return settled


def calibration_windows(source: Any, tokenizer: Any, config: EGGSConfig) -> Windows:
    """Windows from `source`, drawn as a configuration with its `seq_len` says."""
    assert config.seq_len is not None
    drawn = token_windows(
        source,
        tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        sampling=config.sampling,
        seed=config.seed,
        split=config.split,
        text_column=config.text_column,
        config_name=config.dataset_config_name,
        revision=config.dataset_revision,
        token=config.token,
    )
    texts = described(source if isinstance(source, Mapping) else [source], config.split)
    return replace(drawn, texts=[_in_full(text, config) for text in texts])


def _in_full(text: dict[str, Any], config: EGGSConfig) -> dict[str, Any]:
    """A text with its data set's configuration and revision in its name, also where they were given apart from it."""
    if text["split"] is None:  # no data set on the Hub
        return text
    asked = DatasetName.parse(text["name"])
    config_name, revision = asked.config_name or config.dataset_config_name, asked.revision or config.dataset_revision
    name = f"{asked.path}{f':{config_name}' if config_name else ''}{f'@{revision}' if revision else ''}"
    return text | {"name": name}


def name_sources(report: PruneReport, source: Any, windows: Windows, model: Any) -> None:
    """Put into the report what the calibration data and the dense model are called, as others may know them."""
    report.config = EGGSConfig.from_dict(report.config | {"calibration": public_name(source)}).to_dict()
    report.calibration["source"] = report.config["calibration"] or f"{type(source).__name__} in memory"
    report.calibration["overlapping"] = windows.overlapping
    report.calibration["texts"] = windows.texts
    report.base_model = base_model(model)


def base_model(model: Any) -> dict[str, Any] | None:
    """Id and revision of the model on the Hub, if it was loaded from there."""
    config = getattr(model, "config", None)
    name = hub_id(getattr(config, "_name_or_path", None))
    return {"id": name, "revision": getattr(config, "_commit_hash", None)} if name else None
