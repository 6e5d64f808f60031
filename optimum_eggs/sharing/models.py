"""`model.push_to_hub` of a packed model: transformers' own, but with this package's card and report."""

from __future__ import annotations

import filecmp
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from .. import strict_json
from .. import validation as check
from ..engine.report import read_report, without_measurements
from ..files import REPORT_NAME, seal
from ..hf.loading import found_by, set_commit
from .push import check_reachable, check_repo_id, save_and_push

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
    report, source = _report_of(model, repo_id, options.get("token"))
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

    return save_and_push(save, repo_id, **options)


def _report_of(model: Any, repo_id: str, token: str | bool | None) -> tuple[dict[str, Any] | None, Path | None]:
    """The report, and the folder that it and the weights were read from, if they were.

    Raises:
        CheckpointError: the report is damaged.
        HubError: it is on the Hub, which does not answer.
    """
    pruned = getattr(model.hf_quantizer, "report", None)
    if pruned is not None:
        return pruned.to_dict(), None
    source, file = model.config._name_or_path, getattr(model.hf_quantizer, "file", None)
    if not source:  # a state dict came from nowhere
        return None, None
    path = (Path(source) if file is None else Path(file).parent) / REPORT_NAME
    if not path.is_file():
        if Path(source).is_dir():
            return None, None
        check_reachable(repo_id)
        set_commit(model, file)
        where: dict[str, Any] = {"revision": getattr(model.config, "_commit_hash", None), **found_by(source, file)}
        try:
            path = Path(hf_hub_download(source, REPORT_NAME, token=token, **where))
        except (EntryNotFoundError, HTTPError, OSError, ValueError):
            return None, None
    return read_report(path.parent), path.parent


def _same_weights(folder: Path, source: Path) -> bool:
    """Whether two folders hold the same weight files, byte for byte."""
    ours, theirs = ({path.name for path in place.glob("*.safetensors")} for place in (folder, source))
    return ours == theirs and all(filecmp.cmp(folder / name, source / name, shallow=False) for name in ours)
