"""From a configuration to a pruned model: draw the calibration windows, prune, and record where they came from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calibration import token_windows
from ..config import EGGSConfig
from ..names import hub_id, public_name
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
    source = config.calibration if calibration is None else calibration
    windows = calibration_windows(source, tokenizer, config)
    report = prune_model(model, config, windows, progress)
    name_sources(report, source, model)
    return report


def calibration_windows(source: Any, tokenizer: Any, config: EGGSConfig) -> Tensor:
    """Windows (windows, tokens) of token ids from `source`, drawn as the configuration says."""
    return token_windows(
        source,
        tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        sampling=config.sampling,
        seed=config.seed,
        split=config.split,
        text_column=config.text_column,
    )


def name_sources(report: PruneReport, source: Any, model: Any) -> None:
    """Put into the report what the calibration data and the dense model are called, as others may know them."""
    report.config = EGGSConfig.from_dict(report.config | {"calibration": public_name(source)}).to_dict()
    report.calibration["source"] = report.config["calibration"] or f"{type(source).__name__} in memory"
    report.base_model = base_model(model)


def base_model(model: Any) -> dict[str, Any] | None:
    """Id and revision of the model on the Hub, if it was loaded from there."""
    config = getattr(model, "config", None)
    name = hub_id(getattr(config, "_name_or_path", None))
    return {"id": name, "revision": getattr(config, "_commit_hash", None)} if name else None
