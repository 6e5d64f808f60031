"""One commit to the Hub: weights, config, tokenizer, report and card together."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import CheckpointError, HubError, first_line
from ..inspection import inspect_checkpoint
from ..names import hub_id
from .card import has_own_text, read_json, write_card

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Check the packed model in `folder`, write its card, and push all of it in one commit.

    Weights are uploaded first and committed last with everything else, so an upload that fails publishes nothing.

    Args:
        folder: A packed model with its `report.json`; its README.md is written, see [`write_card`]. If it has no text
            of the user's own, that of the card on the Hub is kept.
        repo_id: Where to; it is created if it is not there.
        private: Of a new repository.
        token: As for huggingface_hub.
        revision: Branch to push to; it is created if it is not there.
        create_pr: Open a pull request instead.
        commit_message: Of the commit.
        commit_description: Of the commit.
        tags: Further tags for the card.

    Raises:
        ModelError, CheckpointError: the folder is no packed model, or is damaged.
        HubError: the Hub refused, or could not be reached.
    """
    found = inspect_checkpoint(folder)
    if not found.ok:
        first = found.violations[0]
        raise CheckpointError(
            f"{folder}: {first.where}: {first.rule}: {first.detail}; it is not pushed until this is mended"
        )
    api = HfApi(token=token)
    report = read_json(Path(folder) / "report.json")
    _take_card(Path(folder), repo_id, revision, token)
    write_card(folder, repo_id, _base_card(hub_id((report.get("base_model") or {}).get("id")), token), tags or ())
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload a packed N:M model",
            commit_description=commit_description,
            ignore_patterns=[".*", "*.tmp"],
        )
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: there is no such repository, or the token may not see it; log in with `hf auth login`, or "
            "pass a token that may write"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no answer"
        remedy = "log in with `hf auth login`, or pass a token that may write" if code in (401, 403) else "try again"
        raise HubError(f"{repo_id}: the Hub refused ({code}: {first_line(error)}); {remedy}") from error
    except (OSError, RuntimeError) as error:  # a RuntimeError is what a failed upload of a weight file becomes
        raise HubError(f"{repo_id}: the Hub cannot be reached ({first_line(error)}); nothing was published") from error


def save_and_push(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Have `save` write a packed model to a new folder, and push that as [`push_folder`] does with `options`.

    Returns the address of the pull request, or of the commit.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(folder)
        info = push_folder(folder, repo_id, **options)
    return info.pr_url or info.commit_url


def _take_card(folder: Path, repo_id: str, revision: str | None, token: str | bool | None) -> None:
    """Make the card that is on the Hub the folder's, unless the folder's has text of the user's own."""
    own = folder / "README.md"
    if own.is_file() and has_own_text(own.read_text(encoding="utf-8")):
        return
    try:
        own.write_text(
            Path(hf_hub_download(repo_id, own.name, revision=revision, token=token)).read_text("utf-8"), "utf-8"
        )
    except (HfHubHTTPError, OSError, ValueError):
        return  # there is none; if the Hub cannot be reached, the push will say so


def _base_card(base: str | None, token: str | bool | None) -> ModelCard | None:
    """Card of the dense model, if it can be had: its licence is carried over."""
    if base is None:
        return None
    try:
        return ModelCard.load(base, token=token if isinstance(token, str) else None)
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.warning("%s: its card cannot be read (%s), so its licence is not carried over", base, first_line(error))
        return None
