"""`model.push_to_hub` of a packed model: transformers' own, but with this package's card and report."""

from __future__ import annotations

import filecmp
import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import strict_json
from .. import validation as check
from ..access import closed
from ..engine.report import read_report, without_measurements
from ..errors import ModelError
from ..files import REPORT_NAME, seal
from ..hf.loading import found_by, set_commit
from ..logs import said_once
from .push import check_reachable, check_repo_id, push_saved, refusals

logger = logging.getLogger(__name__)


def push_model(model: Any, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> str:
    """Save the packed model with its report to a folder of its own, and push that with its card.

    The report is that of the pruning, or lies where the model was loaded from. What it says was measured is left out
    if the weights have changed since. Without a report there is nothing to make a card of, and transformers' own push
    runs, with a warning.

    Args:
        model: A packed model.
        repo_id: Where to.
        max_shard_size: As for `save_pretrained`.
        options: As for [`push_folder`].

    Raises:
        EGGSError: as [`push_folder`].
    """
    shard_size = check.size("max_shard_size", max_shard_size)
    check_repo_id(repo_id)
    check_reachable(repo_id)
    report, source = _report_of(model, options.get("token"))
    if report is None:
        logger.warning(
            "%s: no %s was found where the model comes from, so it gets no card of ours", repo_id, REPORT_NAME
        )
        return type(model).push_to_hub(model, repo_id, max_shard_size=shard_size, **options)

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=shard_size)
        kept = report if source is None or _same_weights(folder, source) else without_measurements(report)
        (folder / REPORT_NAME).write_text(strict_json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        seal(folder)

    return push_saved(save, repo_id, **options)


def _report_of(model: Any, token: str | bool | None) -> tuple[dict[str, Any] | None, Path | None]:
    """The report, and the folder that it and the weights were read from, if they were.

    The Hub is asked only for that of weights which came from there: what it has by the name of a folder that was here
    is of another model.

    Raises:
        CheckpointError: the report is damaged.
        ModelError: it may not be read.
        HubError: the Hub does not answer, or anything but that there is no report.
    """
    pruned = getattr(model.hf_quantizer, "report", None)
    if pruned is not None:
        return pruned.to_dict(), None
    source, file = model.config._name_or_path, getattr(model.hf_quantizer, "file", None)
    if not source:  # a state dict came from nowhere
        return None, None
    path = (Path(source) if file is None else Path(file).parent) / REPORT_NAME
    _check_readable(path)
    if not path.is_file():
        where: dict[str, Any] = found_by(source, file)
        if "cache_dir" not in where:  # the weights are not of the Hub
            return None, None
        set_commit(model, file)
        with said_once(), refusals(source, token):
            try:
                path = Path(
                    hf_hub_download(source, REPORT_NAME, token=token, revision=model.config._commit_hash, **where)
                )
            except HfHubHTTPError as error:
                if error.response is not None and error.response.status_code == 404:
                    return None, None
                raise
    return read_report(path.parent), path.parent


def _same_weights(folder: Path, source: Path) -> bool:
    """Whether two folders hold the same weights, byte for byte, in whatever files.

    Raises:
        ModelError: those of `source` may not be read.
    """
    _check_readable(source, *source.glob("*.safetensors"))
    ours, theirs = ({path.name for path in place.glob("*.safetensors")} for place in (folder, source))
    if ours == theirs:
        return all(filecmp.cmp(folder / name, source / name, shallow=False) for name in ours)
    with ExitStack() as stack, suppress(SafetensorError):  # of a file that was damaged since it was loaded
        saved, loaded = (_tensors(stack, place) for place in (folder, source))
        return saved.keys() == loaded.keys() and all(
            _same_bytes(saved[name].get_tensor(name), loaded[name].get_tensor(name)) for name in saved
        )
    return False


def _tensors(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """Name -> the open file that holds the tensor."""
    files = [stack.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dict


def _same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    same_kind = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return same_kind and torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


def _check_readable(*paths: Path) -> None:
    for path in paths:
        why = closed(path)
        if why:
            raise ModelError(f"{path}: {why}")
