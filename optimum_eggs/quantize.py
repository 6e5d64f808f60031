"""From a packed model on disk to one whose values are integers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import validation as check
from .calibration.documents import shown
from .calibration.windows import check_calibration, windows_digest
from .config import EGGSConfig
from .devices import choose_device, device_map
from .engine.quantize import quantize_model
from .engine.report import read_report, without_measurements
from .engine.run import calibration_windows, with_seq_len
from .errors import ConfigError, ModelError
from .files import REPORT_NAME
from .folders import check_output, new_folder
from .hf.attach import attach_quantizer
from .hf.loading import has_tokenizer, load_config, load_model, load_tokenizer, own_memory
from .measure import Meter, devices_of
from .names import public_name
from .strict_json import dumps

logger = logging.getLogger(__name__)

KEYS = ("values", "value_group", "rounding", "rounding_tuning", "tuning_lr", "head", "ignored")
"""Those of the configuration that say how values become integers."""

_WITH_DEFAULTS = ("tuning_lr", "num_samples", "sampling", "seed", "min_expert_tokens", "batch_size")
_TEXT = ("calibration", "split", "text_column", "dataset_config_name", "dataset_revision", "tokenizer", "token")
_CALIBRATION = (
    *_TEXT,
    *("num_samples", "seq_len", "short_share", "sampling", "seed", "batch_size", "min_expert_tokens"),
)


def quantize(
    model_id: str | Path,
    output: str | Path,
    settings: Mapping[str, Any],
    *,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Store the values of the packed model in `model_id` as integers and write it to `output`.

    The masks stay. Rounding to the nearest needs no calibration text; `values="int4"` needs some, unless
    `rounding="nearest"` is asked for.

    Args:
        model_id: A packed model with floats.
        output: Folder to make.
        settings: Keys of [`EGGSConfig`] and their values: those of `KEYS`, such as `values` and `head`; and those of
            the calibration (`calibration`, `num_samples`, `seq_len`, `batch_size`, `seed` and so on). The rest is as
            the model has it.
        device: Where. Default: an accelerator if there is one.
        overwrite: Replace a model that this package saved at `output`.
        max_shard_size: As for transformers.
        trust_remote_code: Run code that comes with the model or its tokenizer.
        progress: Show a progress bar on stderr. Default: if it is a terminal.

    Returns:
        What was done, as it is in `report.json` under `quantization`.

    Raises:
        EGGSError: bad input, or an output that may not be written, before the work begins.
    """
    from .sharing import own_card, put_card, write_card

    shard_size = check.size("max_shard_size", max_shard_size)
    path = check_output(output, overwrite, sources=[model_id])
    own, report = own_card(path), read_report(model_id)
    stored = getattr(load_config(model_id, trust_remote_code), "quantization_config", None)
    if not isinstance(stored, EGGSConfig | dict):
        raise ModelError(f"{model_id}: is not packed; prune it first: `optimum-cli eggs prune ... --set values=int8`")
    was = EGGSConfig.from_dict(stored) if isinstance(stored, dict) else stored
    config = _asked(was, settings)
    source, trust = config.calibration, trust_remote_code
    if source is not None:
        check_calibration(source)
    model = load_model(model_id, device_map=device_map(choose_device(device)), trust_remote_code=trust)
    own_memory(model)
    tokenizer = load_tokenizer(model_id, trust_remote_code=trust) if has_tokenizer(model_id) else None
    windows = None
    if source is not None:
        config = with_seq_len(config, model)
        windows = calibration_windows(source, tokenizer, config)
    needs = sum(value.nbytes for value in model.state_dict().values())
    with new_folder(output, overwrite, sources=[model_id], needs=needs) as folder:
        with Meter(devices_of(model)) as meter:
            codings, tuned = quantize_model(model, config, None if windows is None else windows.ids, meter, progress)
        done: dict[str, Any] = {key: getattr(config, key) for key in KEYS} | {
            "modules": len(codings),
            "calibration": None,
            "tuning": [[block.error_before, block.error_after] for block in tuned],
            "measurements": meter.summary(),
        }
        if windows is not None:
            done["calibration"] = {
                "source": public_name(source),
                "windows": len(windows.ids),
                "seq_len": windows.ids.shape[1],
                "sha256": windows_digest(windows.ids),
                "texts": windows.texts,
            }
        kept = {key: getattr(config, key) for key in KEYS} | {"coded_modules": codings}
        final = EGGSConfig.from_dict(was.to_dict() | kept | {"format_version": None})
        attach_quantizer(model, final)
        model.save_pretrained(folder, max_shard_size=shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        put_card(own, folder)
        if "layers" in report:
            (folder / REPORT_NAME).write_text(dumps(_updated(report, final, codings, done), indent=2) + "\n", "utf-8")
            write_card(folder, path.name)
    return done


def _asked(was: EGGSConfig, settings: Mapping[str, Any]) -> EGGSConfig:
    """The model's configuration with what is asked for, and the calibration of this rounding in place of its own."""
    if was.coded_modules:
        raise ModelError("the model holds integers already; start from the packed model with floats")
    unknown = settings.keys() - {*KEYS, *_CALIBRATION}
    if unknown:
        raise ConfigError(f"{min(unknown)} is not to be chosen here: it is as the model has it; leave it out")
    settings = {key: value for key, value in settings.items() if value is not None}
    text = settings.get("calibration") is not None
    if not text and settings.get("rounding") == "nearest":
        settings = {"rounding_tuning": 0} | settings
    own = {key: None for key in (*KEYS, *_CALIBRATION) if key not in _WITH_DEFAULTS}
    config = was.replace(**own | settings)
    needed = config.rounding == "gptq" or config.rounding_tuning
    if needed and config.calibration is None:
        raise ConfigError(
            f"calibration is missing: values={config.values!r} with rounding={config.rounding!r} and "
            f"rounding_tuning={config.rounding_tuning} reads text; give some, or rounding='nearest' and "
            "rounding_tuning=0"
        )
    if text and not needed:
        logger.warning(
            "calibration=%s is not read: values are rounded to the nearest, and no block is tuned",
            shown(config.calibration),
        )
        return config.replace(calibration=None)
    return config


def _updated(
    report: dict[str, Any], config: EGGSConfig, codings: Mapping[str, str], done: dict[str, Any]
) -> dict[str, Any]:
    """The report of the model that was rounded: without what was measured of it before."""
    layers = [layer | {"coding": codings.get(layer["name"])} for layer in report["layers"]]
    changed = {"config": report["config"] | config.to_dict(), "layers": layers, "quantization": done}
    return without_measurements(report) | changed
