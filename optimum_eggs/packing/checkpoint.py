"""Reading a packed checkpoint with suspicion: files, shapes and bits are checked before they are used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import strict_json
from ..access import no_file
from ..errors import CheckpointError, ConfigError
from ..pattern import NMPattern
from .codes import Coding
from .layout import FLOAT_VERSION, FORMAT_VERSION, meta_width
from .legal import illegal_groups, kept_in_group
from .pack import unpack_mask

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
PARTS = ("weight", "weight_meta", "weight_scale", "bias")
"""The tensors of a packed module, of which not all have all."""

ELEMENT_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, by the name of its dtype in a header."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_PRUNE_AGAIN = "download it again, or prune the model again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is, and its shape and dtype as the file's header states them."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of what it holds; a dtype that is unknown here counts as one byte."""
        return prod(self.shape) * ELEMENT_SIZE.get(self.dtype, 1)


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
    check_version(packed, path)
    return packed


def check_version(packed: Mapping[str, Any], path: str | Path = "config.json") -> None:
    """Check the version of a `quantization_config`, which is of the file `path`.

    Raises:
        CheckpointError: it is not known here, or is not that of what is listed.
    """
    version = packed.get("format_version")
    if isinstance(version, bool) or version not in (FLOAT_VERSION, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: format_version={version!r} is unknown to this release, which reads versions up to "
            f"{FORMAT_VERSION}; upgrade optimum-eggs, or prune the model again"
        )
    if (version == FORMAT_VERSION) != bool(packed.get("coded_modules")):
        listed = "lists" if version == FLOAT_VERSION else "does not list"
        raise CheckpointError(
            f"{path}: format_version={version} {listed} coded_modules, which are of version {FORMAT_VERSION}; "
            f"{_PRUNE_AGAIN}"
        )


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


def codings(config: Mapping[str, Any]) -> dict[str, Coding]:
    """The modules that a `quantization_config` lists as stored in integers, and how.

    Raises:
        CheckpointError: the list is not one of codings.
    """
    coded = config.get("coded_modules")
    if coded is None:
        return {}
    if not isinstance(coded, Mapping):
        raise CheckpointError(f"config.json: coded_modules={coded!r} is no mapping; {_PRUNE_AGAIN}")
    try:
        return {name: Coding.parse(coding) for name, coding in coded.items()}
    except ConfigError as error:
        raise CheckpointError(f"config.json: coded_modules: {error}") from error


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


def check_files(
    files: Sequence[str | Path], pruned: Mapping[str, str], coded: Mapping[str, str] | None = None
) -> dict[str, dict[str, TensorEntry]]:
    """Check the headers of a checkpoint's files against the layers that its configuration lists.

    Args:
        files: Of the checkpoint.
        pruned: Layer -> pattern.
        coded: Module -> coding of its values, pruned or not.

    Returns:
        Pruned or coded module -> those of `PARTS` that it has.

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
    patterns, kinds = listed_modules(pruned, coded or {})
    keys = stored_names(entries, patterns)
    for name, pattern in patterns.items():
        for _, problem in header_problems(keys[name], pattern, entries, kinds.get(name)):
            raise CheckpointError(f"{name}: {problem}; {_PRUNE_AGAIN}")
    for where, problem in unlisted(entries, keys.values()):
        raise CheckpointError(f"{where}: {problem}; {_PRUNE_AGAIN}")
    return {
        name: {part: entries[f"{key}.{part}"] for part in PARTS if f"{key}.{part}" in entries}
        for name, key in keys.items()
    }


def unlisted(entries: Mapping[str, TensorEntry], listed: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(module, problem) for what is packed or stored in integers, and not among the `listed` names in the files."""
    listed = set(listed)
    for key, entry in entries.items():
        where, _, part = key.rpartition(".")
        what = {"weight_meta": "packed", "weight_scale": "stored in integers"}.get(part)
        if part == "weight" and entry.dtype not in _FLOATS and f"{where}.weight_scale" not in entries:
            what = f"of {entry.dtype}"
        if what is not None and where not in listed:
            yield where, f"is {what}, and config.json does not list it"


def listed_modules(
    pruned: Mapping[str, str], coded: Mapping[str, str]
) -> tuple[dict[str, NMPattern | None], dict[str, Coding]]:
    """All that a configuration lists: module -> pattern, None where all values are kept; and module -> coding."""
    patterns: dict[str, NMPattern | None] = {name: NMPattern.parse(pattern) for name, pattern in pruned.items()}
    patterns |= {name: None for name in coded if name not in patterns}
    return patterns, {name: Coding.parse(coding) for name, coding in coded.items()}


def stored_names(entries: Mapping[str, TensorEntry], names: Iterable[str]) -> dict[str, str]:
    """The names that the files have for layers: layer -> name in the files, the layer's own where there is none.

    They may differ in their first parts (a base model's prefix), but never in the number of the block or what follows;
    and a tensor that is another layer's under its own name is never taken.
    """
    names = list(names)
    packed = {key.rpartition(".")[0] for key in entries if key.endswith((".weight_meta", ".weight_scale"))}
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


def header_problems(
    name: str, pattern: NMPattern | None, entries: Mapping[str, TensorEntry], coding: Coding | None = None
) -> Iterator[tuple[str, str]]:
    """(rule, problem) for each thing wrong with the shapes and dtypes of a packed or coded module's tensors."""
    needed = ["weight"] + ["weight_meta"] * (pattern is not None) + ["weight_scale"] * (coding is not None)
    found = {part: entries.get(f"{name}.{part}") for part in needed}
    for part, entry in found.items():
        if entry is None:
            what = "pruned" if part == "weight_meta" or coding is None else f"coded ({coding})"
            yield "missing tensor", f"config.json lists it as {what}, and its {part} is missing"
            return
    weight, meta, scale = found["weight"], found.get("weight_meta"), found.get("weight_scale")
    assert weight is not None
    width = (weight.shape or (0,))[-1]
    values = width if coding is None else coding.held(width)
    n, m = (1, 1) if pattern is None else (pattern.n, pattern.m)
    if len(weight.shape) != 2 or values % n or 0 in weight.shape:
        columns = "in" if pattern is None else f"in*{n}/{m}" + "/2" * (coding is not None and coding.bits == 4)
        yield "weight shape", f"weight has shape {weight.shape}; at {pattern or 'all kept'} it must be (out, {columns})"
        return
    allowed = _FLOATS if coding is None else ("I8",) if coding.bits == 8 else ("U8",)
    if weight.dtype not in allowed:
        yield "weight dtype", f"weight has dtype {weight.dtype}; it must be {_either(allowed)}"
    if meta is not None and meta.dtype != "U8":
        yield "weight_meta dtype", f"weight_meta has dtype {meta.dtype}; it must be U8"
    in_features = values // n * m
    expected = (weight.shape[0], meta_width(in_features))
    if meta is not None and meta.shape != expected:
        yield (
            "weight_meta length",
            f"weight_meta has shape {meta.shape}; with weight {weight.shape} at {pattern} it must be {expected}",
        )
    if scale is not None and coding is not None:
        if scale.dtype != "BF16":
            yield "weight_scale dtype", f"weight_scale has dtype {scale.dtype}; it must be BF16"
        expected = (weight.shape[0], coding.scales(in_features))
        if scale.shape != expected:
            yield (
                "weight_scale shape",
                f"weight_scale has shape {scale.shape}; with weight {weight.shape} and {coding} it must be {expected}",
            )
    bias = entries.get(f"{name}.bias")
    if bias is not None and bias.shape != weight.shape[:1]:
        yield "bias shape", f"bias has shape {bias.shape}; with weight {weight.shape} it must be {weight.shape[:1]}"


def _either(allowed: Sequence[str]) -> str:
    return " or ".join([", ".join(allowed[:-1])] * (len(allowed) > 1) + [allowed[-1]])


def tensor_problems(
    weight: Tensor,
    meta: Tensor | None,
    pattern: NMPattern | None,
    scale: Tensor | None = None,
    coding: Coding | None = None,
) -> Iterator[tuple[str, str]]:
    """(rule, problem) for each thing wrong with the contents of a packed or coded module whose shapes are right."""
    if meta is not None and pattern is not None:
        values = weight.shape[1] if coding is None else coding.held(weight.shape[1])
        in_features = values // pattern.n * pattern.m
        bits = unpack_mask(meta, meta.shape[1] * 8)
        mask = bits[:, :in_features]
        wrong = illegal_groups(mask, pattern)
        if len(wrong):
            row, group = wrong[0].tolist()
            yield (
                "pattern",
                f"weight_meta keeps {kept_in_group(mask, pattern, row, group)} of {pattern.m} in row {row}, group "
                f"{group} (and in {len(wrong) - 1} more groups); {pattern} keeps exactly {pattern.n}",
            )
        if bool(bits[:, in_features:].any()):
            yield "padding", f"weight_meta has bits set beyond in_features={in_features}; they must be zero"
    for name, tensor in {"weight": weight, "weight_scale": scale}.items():
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield "values", f"{name} holds NaN or infinite values"


def check_packed_tensors(
    name: str,
    weight: Tensor,
    meta: Tensor | None,
    pattern: NMPattern | None,
    scale: Tensor | None = None,
    coding: Coding | None = None,
) -> None:
    """Check the contents of a packed or coded module.

    Raises:
        CheckpointError: the first violation found.
    """
    for _, problem in tensor_problems(weight, meta, pattern, scale, coding):
        raise CheckpointError(f"{name}: {problem}; {_PRUNE_AGAIN}")
