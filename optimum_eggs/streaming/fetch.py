"""The files of a model that are read block by block: a folder of the user's, or of the Hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..folders import check_folder
from ..hf.loading import translated
from ..names import hub_id
from ..packing.checkpoint import INDEX_NAME, WEIGHTS_NAME

_BESIDE = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]  # configurations, tokenizers and their code


def fetch(model: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a model. One that is named by its id on the Hub is downloaded to the cache, or found there.

    Of its weights, only those that `from_pretrained` would read are downloaded; none that are no safetensors files.
    Code is downloaded too, and not run.

    Raises:
        ModelError: there is no such model, or the Hub cannot be reached.
    """
    name = hub_id(str(model))
    if name is None:
        check_folder(model)
        return Path(model)
    from huggingface_hub import snapshot_download

    with translated(name, "model", token):
        asked: dict[str, Any] = {"repo_id": name, "token": token}
        folder = Path(snapshot_download(**asked, revision=revision, allow_patterns=[*_BESIDE, WEIGHTS_NAME]))
        index = folder / INDEX_NAME
        if index.is_file() and not (folder / WEIGHTS_NAME).is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            folder = Path(snapshot_download(**asked, revision=folder.name, allow_patterns=names))
        return folder


def is_streamable(model: str | Path, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a model is in safetensors files, in a folder or on the Hub.

    Raises:
        ModelError: as `fetch`.
    """
    folder = fetch(model, revision, token)
    return any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))
