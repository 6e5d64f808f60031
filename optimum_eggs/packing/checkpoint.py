"""Reading a packed checkpoint with suspicion: files, shapes and bits are checked before they are used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import strict_json
from ..access import no_file
from ..errors import CheckpointError, ConfigError
from ..pattern import NMPattern
from .layout import FORMAT_VERSION, meta_width
from .legal import illegal_groups, kept_in_group
from .pack import unpack_mask

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_PRUNE_AGAIN = "download it again, or prune the model again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is, and its shape and dtype as the file's header states them."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint's config.json.

    Raises:
        CheckpointError: no folder, no config or none that can be read, or it is not of a packed checkpoint of a version
            known here.
    """
    path = Path(folder) / "config.json"
    why = no_file(path)
    if why:
        raise CheckpointError(f"{path}: {why}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no config.json in it; pass the folder of a saved model")
    try:
        config = strict_json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); {_PRUNE_AGAIN}") from error
    packed = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(packed, dict) or packed.get("quant_method") != "eggs":
        raise CheckpointError(f"{path}: has no quantization_config of 'eggs': this model is not packed; prune it first")
    if packed.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={packed.get('format_version')!r} is unknown to this release, which reads version "
            f"{FORMAT_VERSION}; upgrade optimum-eggs, or prune the model again"
        )
    return packed


def pruned_patterns(config: Mapping[str, Any]) -> dict[str, NMPattern]:
    """The pruned layers that a `quantization_config` lists, and their patterns.

    Raises:
        CheckpointError: the list is missing, empty or not of patterns.
    """
    pruned = config.get("pruned_modules")
    if not isinstance(pruned, Mapping) or not pruned:
        raise CheckpointError(f"config.json: pruned_modules={pruned!r} lists no layers; {_PRUNE_AGAIN}")
    try:
        return {name: NMPattern.parse(pattern) for name, pattern in pruned.items()}
    except ConfigError as error:
        raise CheckpointError(f"config.json: pruned_modules: {error}") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: the one file or, without it, those of the index, as transformers.

    Raises:
        CheckpointError: there are none, one cannot be read, the index is damaged or names a file that is not there.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if index.is_file() and not (folder / WEIGHTS_NAME).is_file():
        _check_readable(index)
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index ({error}); {_PRUNE_AGAIN}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS_NAME]
    for file in files:
        _check_readable(file)
    return files


def _check_readable(file: Path) -> None:
    why = no_file(file)
    if why:
        raise CheckpointError(f"{file}: {why}")
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; {_PRUNE_AGAIN}")


def read_headers(files: Sequence[str | Path]) -> dict[str, TensorEntry]:
    """Every tensor of the files by name, from their headers alone.

    Raises:
        CheckpointError: a file is missing or cannot be read, is truncated or no safetensors file.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        _check_readable(Path(file))
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    entries[name] = TensorEntry(Path(file), tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is truncated or no safetensors file ({error}); {_PRUNE_AGAIN}") from error
    return entries


def check_files(files: Sequence[str | Path], pruned: Mapping[str, str]) -> dict[str, dict[str, TensorEntry]]:
    """Check the headers of a checkpoint's files against the layers that its configuration lists.

    Returns:
        Layer -> its tensors: `"weight"`, `"weight_meta"` and, if it has one, `"bias"`.

    Raises:
        CheckpointError: the first violation found.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise CheckpointError(f"{list(map(str, files))}: a packed checkpoint is of safetensors files only")
    entries = read_headers(files)
    if pruned and not any(name.endswith(".weight_meta") for name in entries):
        raise CheckpointError(
            f"{files[0]}: config.json says that {len(pruned)} layers are packed, and the files hold no packed layer, "
            "as when a model that was made from a packed model's configuration is saved; take quantization_config out "
            "of config.json to load what they hold"
        )
    keys = stored_names(entries, pruned)
    for name, pattern in pruned.items():
        for _, problem in header_problems(keys[name], NMPattern.parse(pattern), entries):
            raise CheckpointError(f"{name}: {problem}; {_PRUNE_AGAIN}")
    parts = ("weight", "weight_meta", "bias")
    return {
        name: {part: entries[f"{key}.{part}"] for part in parts if f"{key}.{part}" in entries}
        for name, key in keys.items()
    }


def stored_names(entries: Mapping[str, TensorEntry], names: Iterable[str]) -> dict[str, str]:
    """The names that the files have for layers: layer -> name in the files, the layer's own where there is none.

    They may differ in their first parts (a base model's prefix), but never in the number of the block or what follows;
    and a tensor that is another layer's under its own name is never taken.
    """
    names = list(names)
    packed = {key.removesuffix(".weight_meta") for key in entries if key.endswith(".weight_meta")}
    free = packed - set(names)
    return {name: name if name in packed else _renamed(name, free) for name in names}


def _renamed(name: str, free: set[str]) -> str:
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    for start in range(block):
        end = ".".join(parts[start:])
        found = [key for key in free if key == end or key.endswith(f".{end}")]
        if len(found) == 1:
            return found[0]
    return name


def header_problems(name: str, pattern: NMPattern, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str]]:
    """(rule, problem) for each thing wrong with the shapes and dtypes of a packed layer's tensors."""
    weight, meta = entries.get(f"{name}.weight"), entries.get(f"{name}.weight_meta")
    if weight is None or meta is None:
        missing = "weight" if weight is None else "weight_meta"
        yield "missing tensor", f"config.json lists it as pruned, and its {missing} is missing"
        return
    if len(weight.shape) != 2 or weight.shape[1] % pattern.n or 0 in weight.shape:
        yield (
            "weight shape",
            f"weight has shape {weight.shape}; at {pattern} it must be (out, in*{pattern.n}/{pattern.m})",
        )
        return
    if weight.dtype not in ("F32", "F16", "BF16", "F64"):
        yield "weight dtype", f"weight has dtype {weight.dtype}; it must be F64, F32, F16 or BF16"
    if meta.dtype != "U8":
        yield "weight_meta dtype", f"weight_meta has dtype {meta.dtype}; it must be U8"
    expected = (weight.shape[0], meta_width(weight.shape[1] // pattern.n * pattern.m))
    if meta.shape != expected:
        yield (
            "weight_meta length",
            f"weight_meta has shape {meta.shape}; with weight {weight.shape} at {pattern} it must be {expected}",
        )
    bias = entries.get(f"{name}.bias")
    if bias is not None and bias.shape != weight.shape[:1]:
        yield "bias shape", f"bias has shape {bias.shape}; with weight {weight.shape} it must be {weight.shape[:1]}"


def tensor_problems(weight: Tensor, meta: Tensor, pattern: NMPattern) -> Iterator[tuple[str, str]]:
    """(rule, problem) for each thing wrong with the contents of a packed layer whose shapes are right."""
    in_features = weight.shape[1] // pattern.n * pattern.m
    bits = unpack_mask(meta, meta.shape[1] * 8)
    mask = bits[:, :in_features]
    wrong = illegal_groups(mask, pattern)
    if len(wrong):
        row, group = wrong[0].tolist()
        yield (
            "pattern",
            f"weight_meta keeps {kept_in_group(mask, pattern, row, group)} of {pattern.m} in row {row}, group {group} "
            f"(and in {len(wrong) - 1} more groups); {pattern} keeps exactly {pattern.n}",
        )
    if bool(bits[:, in_features:].any()):
        yield "padding", f"weight_meta has bits set beyond in_features={in_features}; they must be zero"
    if not bool(torch.isfinite(weight).all()):
        yield "values", "weight holds NaN or infinite values"


def check_packed_tensors(name: str, weight: Tensor, meta: Tensor, pattern: NMPattern) -> None:
    """Check the contents of a packed layer.

    Raises:
        CheckpointError: the first violation found.
    """
    for _, problem in tensor_problems(weight, meta, pattern):
        raise CheckpointError(f"{name}: {problem}; {_PRUNE_AGAIN}")
