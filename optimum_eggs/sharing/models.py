"""`model.push_to_hub` of a packed model: transformers' own, but with this package's card and report."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..engine.report import REPORT_NAME
from .push import push_folder

logger = logging.getLogger(__name__)


def push_model(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> str:
    """Save the packed model with its report to a folder of its own, and push that with its card.

    The report is that of the pruning, or lies where the model was loaded from. Without one there is nothing to make a
    card of, and transformers' own push runs, with a warning.
    """
    report = _report_of(model, token)
    if report is None:
        logger.warning(
            "%s: no %s was found where the model comes from, so it gets no card of ours", repo_id, REPORT_NAME
        )
        return type(model).push_to_hub(
            model,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            max_shard_size=max_shard_size,
            **options,
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (Path(folder) / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        info = push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload a packed N:M model",
        )
    return info.pr_url or info.commit_url


def _report_of(model: Any, token: str | bool | None) -> dict[str, Any] | None:
    pruned = getattr(model.hf_quantizer, "report", None)
    if pruned is not None:
        return pruned.to_dict()
    source = model.config._name_or_path
    path = Path(source) / REPORT_NAME
    if not path.is_file():
        if Path(source).is_dir() or not source:
            return None
        try:
            path = Path(hf_hub_download(source, REPORT_NAME, token=token))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return None
    return json.loads(path.read_text(encoding="utf-8"))
