"""Loading models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from ..access import closed, is_there, kind, no_file, no_utf8
from ..dtypes import DTYPES
from ..errors import (
    CheckpointError,
    ConfigError,
    EGGSError,
    ModelError,
    first_line,
    is_out_of_memory,
    led_by,
    without,
)
from ..folders import check_folder
from ..logs import said_once
from ..names import hub_id
from ..packing.checkpoint import INDEX_NAME, WEIGHTS_NAME, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
    "trust_remote_code",
    "code_revision",
)
_REFUSED = re.compile(r"unsupported (global|class|operand 149)|not an allowed global", re.IGNORECASE)
"""What torch says of a pickle that holds more than tensors; operand 149 is of pickles that torch did not write."""


def parse_dtype(name: str | torch.dtype | None) -> str | torch.dtype:
    """`"bfloat16"` to `torch.bfloat16`; `None` and `"auto"` to `"auto"`.

    Raises:
        ConfigError: no such dtype, or one that holds no fractions.
    """
    if isinstance(name, torch.dtype):
        if not name.is_floating_point:
            raise ConfigError(f"dtype={name} holds no fractions; use one such as torch.bfloat16")
        return name
    if name is None or name == "auto":
        return "auto"
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is unknown; use one of {list(DTYPES)}")
    return getattr(torch, name)


def split_gguf(model_id: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """A path that is a GGUF file itself, as (folder, file)."""
    path = Path(model_id)
    if gguf_file is None and path.suffix == ".gguf" and kind(path) == "file" and not closed(path):
        return str(path.parent), path.name
    return str(model_id), gguf_file


def _gguf_option(source: str, gguf_file: str | None, subfolder: str | None) -> dict[str, str]:
    """The argument of `from_pretrained` for a GGUF file.

    Raises:
        ModelError: the model is a folder here, and the file is not in it, or cannot be read.
    """
    if gguf_file is None:
        return {}
    folder = Path(source, subfolder or "")
    if kind(folder) == "folder" and not closed(folder):
        file = folder / gguf_file
        why = (no_file(file) or no_utf8(file)) if gguf_file else None
        if why is None and not (gguf_file and is_there(file)):
            there = sorted(each.name for each in folder.glob("*.gguf"))
            others = f"; name one of {there}"
            none = ", which holds no GGUF file; leave gguf_file out to load its safetensors"
            why = f"there is no such file in {folder}{others if there else none}"
        if why:
            raise ModelError(f"gguf_file={gguf_file!r}: {why}")
    return {"gguf_file": gguf_file}


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that hold for a model's configuration and tokenizer too.

    >>> hub_options({"revision": "main", "device_map": "cpu"})
    {'revision': 'main'}
    """
    return {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS}


def stored_dtype(folder: str | Path, trust_remote_code: bool = False) -> torch.dtype:
    """Dtype of the weights of a saved model, from its config alone; float32 if it does not say.

    Raises:
        ModelError: there is no such model.
    """
    return load_config(folder, trust_remote_code).dtype or torch.float32


def load_config(
    model_id: str | Path, trust_remote_code: bool = False, *, gguf_file: str | None = None, **kwargs: Any
) -> Any:
    """The configuration of a saved model; arguments as of [`load_model`].

    Raises:
        ModelError: there is no such model.
    """
    from transformers import AutoConfig

    source, gguf_file = split_gguf(model_id, gguf_file)
    extra = _gguf_option(source, gguf_file, kwargs.get("subfolder"))
    with translated(source, "model", kwargs.get("token"), kwargs.get("subfolder")):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra, **kwargs)


def check_weights(model_id: str | Path) -> None:
    """Raise if the safetensors files that a model in a folder is loaded from are not all there, or may not be read.

    Pickled weights, GGUF files and models on the Hub are looked at when they are loaded.

    Raises:
        CheckpointError: one is not there, or may not.
    """
    if any(kind(Path(model_id) / name) for name in (WEIGHTS_NAME, INDEX_NAME)):
        weight_files(model_id)


def load_model(
    model_id: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model with the class that its config names.

    Args:
        model_id: Folder, id on the Hub, or path of a GGUF file.
        gguf_file: Name of a GGUF file in it; it is loaded as an ordinary dense model.
        dtype: As for transformers; default `"auto"`.
        kwargs: Passed to `from_pretrained`. With `trust_remote_code=True`, code that comes with the model is run; never
            without.

    Raises:
        ModelError: the model cannot be found or loaded.
        CheckpointError: a packed checkpoint is damaged.
    """
    import transformers

    source, gguf_file = split_gguf(model_id, gguf_file)
    extra = _gguf_option(source, gguf_file, kwargs.get("subfolder"))
    kwargs = {"trust_remote_code": False, **kwargs}  # where nothing is said, transformers would ask on the terminal
    hub = hub_options(kwargs)
    with translated(source, "model", kwargs.get("token"), kwargs.get("subfolder")):
        config = transformers.AutoConfig.from_pretrained(source, **extra, **hub)
        cls = model_class(config, kwargs["trust_remote_code"]) or transformers.AutoModelForCausalLM
        model = cls.from_pretrained(source, dtype=parse_dtype(dtype), **extra, **kwargs)
    if gguf_file:
        # The weights are dense by now; transformers would still refuse to save a model that says it is GGUF.
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
    if hub_id(source):
        set_commit(model, _cached(source, hub))
    return model


_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


def set_commit(model: PreTrainedModel, file: str | None) -> None:
    """Note in a model's configuration which commit on the Hub it is of, from where the cache has a file of it."""
    found = _SNAPSHOT.search(file or "")
    if found:
        model.config._commit_hash = found[1]  # older versions of transformers do so themselves


def found_by(source: str, file: str | None) -> dict[str, str]:
    """The `subfolder`, and of a model on the Hub the `cache_dir`, by which a file of the model `source` was found.

    >>> found_by("here/all", "here/all/one/model.safetensors")
    {'subfolder': 'one'}
    """
    if file is None:
        return {}
    found = _SNAPSHOT.search(file) if hub_id(source) else None
    if found:
        return {"cache_dir": str(Path(file[: found.start()]).parent), **_subfolder(Path(file[found.end() :]))}
    return _subfolder(Path(file).relative_to(source)) if Path(file).is_relative_to(source) else {}


def _subfolder(file: Path) -> dict[str, str]:
    return {} if file.parent == Path() else {"subfolder": file.parent.as_posix()}


def _cached(source: str, hub: Mapping[str, Any]) -> str | None:
    """Where the cache has the configuration of a model that was just loaded from the Hub."""
    from huggingface_hub import try_to_load_from_cache

    name = "/".join(part for part in (hub.get("subfolder"), "config.json") if part)
    found = try_to_load_from_cache(source, name, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    return found if isinstance(found, str) else None


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class in transformers that a configuration names; None if there is none, or if it brings trusted code."""
    import transformers

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], None) if names else None


@torch.no_grad()
def own_memory(model: torch.nn.Module) -> None:
    """Give every parameter memory of its own, in place.

    Weights loaded from a safetensors file share one mapping of it, which is only released when the last of them is
    gone: replacing some of them would free nothing.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def load_tokenizer(model_id: str | Path, *, gguf_file: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; arguments as of [`load_model`].

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    source, gguf_file = split_gguf(model_id, gguf_file)
    extra = _gguf_option(source, gguf_file, kwargs.get("subfolder"))
    kwargs = {"trust_remote_code": False, **kwargs}
    with translated(source, "tokenizer", kwargs.get("token"), kwargs.get("subfolder")):
        return AutoTokenizer.from_pretrained(source, **extra, **kwargs)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


@contextmanager
def translated(source: str, what: str, token: str | bool | None = None, subfolder: str | None = None) -> Iterator[None]:
    """Turns what transformers raises for a missing or damaged model into one of this package's errors.

    Its message and what led to it do not hold the `token`.
    """
    shown = f"{source}/{subfolder}" if subfolder else source
    path = Path(shown)
    on_the_hub = hub_id(source) is not None
    if not on_the_hub:
        check_folder(shown if source else "")
        _check_config(path)
    try:
        with said_once():
            yield
    except EGGSError:
        raise
    except (SafetensorError, UnpicklingError, EOFError) as error:
        if isinstance(error, UnpicklingError) and _REFUSED.search(str(error)):
            raise CheckpointError(
                f"{source}: a weight file holds more than tensors, which could run code, and is not loaded; have "
                "whoever made it save it as safetensors"
            ) from error
        raise CheckpointError(f"{source}: a weight file is damaged ({first_line(error)}); download it again") from error
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError, HTTPError) as error:
        # the types before the last are what transformers raises for JSON of other types than it expects
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source}: the {what} comes with code of its own, which is not run unasked; read it, and pass "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        why = None if on_the_hub else _unreadable(path, what, error)
        if why:
            raise ModelError(why) from error
        said, cause = without(token, first_line(error)), without(token, error)
        if sys.flags.optimize > 1 and "docstring" in said:
            raise ModelError(
                f"{source}: cannot load the {what}: transformers reads its own docstrings, and Python runs without "
                "them; start it without -OO, or PYTHONOPTIMIZE=2"
            ) from cause
        kinds = {type(each) for each in led_by(error)} if on_the_hub else set()
        if RepositoryNotFoundError in kinds:
            raise ModelError(
                f"{source}: there is no such folder, and no such {what} on the Hub, or the token may not see it; check "
                "the name, or log in with `hf auth login`"
            ) from cause
        if LocalEntryNotFoundError in kinds:
            raise ModelError(
                f"{source}: there is no such folder, and the {what} is neither in the cache nor can the Hub be reached "
                f"({said}); check the name and the network"
            ) from cause
        raise ModelError(f"{source}: cannot load the {what}: {said}") from cause
    except Exception as error:
        if without(token, error) is None:
            raise ModelError(f"{source}: cannot load the {what}: {without(token, first_line(error))}") from None
        raise


def _check_config(folder: Path) -> None:
    """Raise if the configuration of a saved model is missing, or may not be read.

    Raises:
        ModelError: it is, or may not.
    """
    file = folder / "config.json"
    why = no_file(file)
    if why:
        raise ModelError(f"{file}: {why}")
    if not any(folder.glob("*.gguf")) and kind(file) != "file":
        raise ModelError(f"{folder}: there is no config.json in it; pass the folder of a saved model")


def _unreadable(folder: Path, what: str, error: Exception) -> str | None:
    """The file of a saved model that an error is about, and why it cannot be read, if it is for that."""
    said = " ".join(str(each) for each in led_by(error))
    for file in sorted(folder.glob("*.*")):
        # of a tokenizer without its file, transformers says what kinds there are, and names none
        if file.name in said or (what == "tokenizer" and file.name.startswith(("tokenizer", "vocab", "merges"))):
            why = no_file(file)
            if why:
                return f"{file}: {why}"
    return None
