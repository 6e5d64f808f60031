"""One commit to the Hub: weights, config, tokenizer, report and card together."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status, validate_repo_id

from ..access import closed, no_utf8
from ..engine.report import read_report
from ..errors import ConfigError, EGGSError, HubError, ModelError, first_line, is_out_of_memory, without
from ..folders import check_folder
from ..inspection import inspect_checkpoint
from ..logs import said_once
from ..names import hub_id
from .card import CARD_NAME, card_text, has_own_text, model_card, parsed, read_card

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

_PATIENCE = 10  # seconds in which the Hub must begin to answer
_InvalidURL = sys.modules[HTTPError.__module__].InvalidURL  # that of httpx or httpx2, as huggingface_hub uses


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
    """Check the packed model in `folder`, make its card, and push all of it in one commit. The folder is only read.

    Weights are uploaded first and committed last with everything else, so an upload that fails publishes nothing. The
    report and the card are read first, then the Hub must answer, and only then are the weights read.

    Args:
        folder: A packed model with its `report.json`. The card that is pushed is made as by [`write_card`]; if the
            README.md in the folder has no text of the user's own, that of the card on the Hub is kept.
        repo_id: Where to; it is created if it is not there.
        private: Of a new repository.
        token: As for huggingface_hub.
        revision: Branch to push to; it is created if it is not there.
        create_pr: Open a pull request instead.
        commit_message: Of the commit.
        commit_description: Of the commit.
        tags: Further tags for the card.

    Raises:
        ConfigError: `repo_id` is no name of a repository.
        ModelError, CheckpointError: the folder is no packed model, is damaged, or has a file that cannot be read.
        HubError: the Hub refused, or could not be reached. Neither its message nor what led to it holds the `token`.
    """
    check_repo_id(repo_id)
    check_folder(folder)
    pushed_files(Path(folder))
    model_card(folder, repo_id)
    check_reachable(repo_id)
    return _push(
        Path(folder),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        tags=tags,
    )


def _push(
    folder: Path,
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
    """[`push_folder`] from where the Hub has answered."""
    inspect_checkpoint(folder).raise_first("it is not pushed until this is mended")
    report = read_report(folder)
    api = HfApi(token=token)
    with said_once(), refusals(repo_id, token):
        existing = _card_before(folder / CARD_NAME, repo_id, revision, token)
        base = _base_card(hub_id((report.get("base_model") or {}).get("id")), token)
        card = model_card(folder, repo_id, base, tags or (), existing=existing)
        _check_card(card, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            _additions(folder, card),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload a packed N:M model",
            commit_description=commit_description,
        )


def check_repo_id(repo_id: Any) -> None:
    """Raise unless this may be the name of a repository.

    Raises:
        ConfigError: it may not.
    """
    try:
        validate_repo_id("" if repo_id is None else repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"repo_id={repo_id!r} is no name of a repository on the Hub; write NAME or USER/NAME, of letters, digits "
            "and single - _ ."
        ) from error


def check_reachable(repo_id: str) -> None:
    """Raise unless the Hub answers, whatever it says: one request, which is not tried again.

    Raises:
        HubError: it does not, or may not be asked.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE=1 forbids every request to the Hub; push without it")
    with refusals(repo_id, None):
        get_session().head(f"{constants.ENDPOINT}/api/models/{repo_id}", timeout=_PATIENCE)


@contextmanager
def refusals(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a [`HubError`] that does not hold the `token`."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, _InvalidURL) as error:
        # a RuntimeError is what a failed upload of a weight file becomes
        if isinstance(error, EGGSError) or is_out_of_memory(error):
            raise
        raise HubError(f"{repo_id}: {_why_refused(error, token)}") from without(token, error)


def _why_refused(error: Exception, token: str | bool | None) -> str:
    """What an error of huggingface_hub says of the Hub, and what to do, without the `token`."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the Hub did answer, and only then was the cache looked at
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or the token may not see it; log in with `hf auth login`, or pass a token "
            "that may write"
        )
    said = without(token, first_line(error))
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code if error.response is not None else "no answer"
        remedy = "log in with `hf auth login`, or pass a token that may write" if code in (401, 403) else "try again"
        return f"the Hub refused ({code}: {said}); {remedy}"
    if isinstance(error, _InvalidURL):
        return f"HF_ENDPOINT={constants.ENDPOINT!r} is no address ({said}); mend it, or unset it"
    return f"the Hub cannot be reached ({said}); nothing was published"


def _check_card(card: ModelCard, repo_id: str) -> None:
    """Have the Hub check the metadata of a card, before there is a repository for it.

    Raises:
        HubError: the Hub refuses it.
    """
    # Not by `card.validate()`, which before huggingface_hub 2.2 asks huggingface.co, whatever the endpoint is.
    body = {"repoType": "model", "content": str(card)}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
    try:
        hf_raise_for_status(answer)
    except HTTPError as error:
        if answer.status_code != 400:
            raise
        said = str(answer.text)
        with suppress(ValueError, LookupError, TypeError):
            said = "; ".join(each["message"] for each in json.loads(said)["errors"])
        raise HubError(
            f"{repo_id}: the Hub refuses the metadata of its card ({' '.join(said.split())}); mend it in {CARD_NAME}; "
            "nothing was published"
        ) from error


def pushed_files(folder: Path) -> list[str]:
    """Names in a folder of the files that are pushed as they are: all but hidden and half-written ones, and the card.

    Raises:
        ModelError: one of them, or a folder that they may be in, may not be read, or has a name that is no UTF-8.
    """
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    names = []
    for name in filter_repo_objects(found, ignore_patterns=[".*", "*/.*", "*.tmp"]):
        path = folder / name
        why = closed(path) or no_utf8(path)
        if why:
            raise ModelError(f"{path}: {why}")
        if path.is_file() and name != CARD_NAME:
            names.append(name)
    return names


def _additions(folder: Path, card: ModelCard) -> list[CommitOperationAdd]:
    """The files of a folder that are pushed, and its card."""
    files = [CommitOperationAdd(name, folder / name) for name in pushed_files(folder)]
    return [*files, CommitOperationAdd(CARD_NAME, card_text(card).encode())]


def save_and_push(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Have `save` write a packed model to a new folder, and push that as [`push_folder`] does with `options`.

    Returns the address of the pull request, or of the commit.
    """
    check_repo_id(repo_id)
    check_reachable(repo_id)
    return push_saved(save, repo_id, **options)


def push_saved(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """[`save_and_push`] from where the Hub has answered."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(folder)
        info = _push(folder, repo_id, **options)
    return info.pr_url or info.commit_url


def _card_before(own: Path, repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """The text of the card that a new one is merged into: the folder's `own` if a user wrote in it, or the Hub's.

    Of a branch that is still to be made, that is the card of the default one, which it begins as.
    """
    text = read_card(own) if own.is_file() else None
    if text is not None and has_own_text(text):
        return text
    for branch in (revision, None):
        try:
            return read_card(Path(hf_hub_download(repo_id, CARD_NAME, revision=branch, token=token)))
        except LocalEntryNotFoundError:  # the Hub cannot be reached
            raise
        except RevisionNotFoundError:
            continue
        except (HfHubHTTPError, EntryNotFoundError):
            break
    return text


def _base_card(base: str | None, token: str | bool | None) -> ModelCard | None:
    """Card of the dense model, if it can be had: its licence is carried over."""
    if base is None:
        return None
    try:
        return parsed(read_card(Path(hf_hub_download(base, CARD_NAME, token=token))))
    except (HTTPError, OSError, ValueError) as error:
        said = without(token, first_line(error))
        logger.warning("%s: its card cannot be read (%s), so its licence is not carried over", base, said)
        return None
