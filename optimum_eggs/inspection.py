"""Inspecting a packed checkpoint from its files alone: what is wrong with it, and the certificate of every layer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from .engine.report import read_report
from .errors import CheckpointError
from .files import REPORT_NAME, changed_files
from .folders import check_folder
from .masks.certificate import Certificate, certify
from .masks.spectra import Spectra, spectra
from .packing import unpack
from .packing.checkpoint import (
    PARTS,
    TensorEntry,
    codings,
    header_problems,
    pruned_patterns,
    read_config,
    read_headers,
    stored_names,
    tensor_problems,
    unlisted,
    weight_files,
)
from .packing.codes import Coding, decode
from .packing.pack import unpack_mask
from .pattern import NMPattern

_DENSE_SIZE = 2
"""Bytes of a dense value beside which integers are measured: bfloat16."""


@dataclass(frozen=True)
class Violation:
    """One thing wrong: the layer or file, the rule it breaks, and how."""

    where: str
    rule: str
    detail: str


@dataclass(frozen=True)
class InspectedLayer:
    """One packed layer of a checkpoint.

    Attributes:
        packed_bytes: Of values, scales and bits.
        dense_bytes: Of the dense weight in the dtype of the values; in bfloat16 where these are integers.
        certificate: Of the mask.
        spectra: None where it was not asked for.
        coding: Kind and group of integers, such as `"int8:128"`; None for floats.
    """

    name: str
    out_features: int
    in_features: int
    pattern: str
    packed_bytes: int
    dense_bytes: int
    certificate: Certificate
    spectra: Spectra | None = None
    coding: str | None = None


@dataclass
class Inspection:
    """The findings. `config` is the checkpoint's `quantization_config`, if it could be read."""

    folder: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[InspectedLayer] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.violations

    def raise_first(self, remedy: str) -> None:
        """Raise if anything is wrong, with what to do about it.

        Raises:
            CheckpointError: the first violation.
        """
        if self.violations:
            first = self.violations[0]
            raise CheckpointError(f"{self.folder}: {first.where}: {first.rule}: {first.detail}; {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        layers = [asdict(layer) | {"certificate": layer.certificate.to_dict()} for layer in self.layers]
        return {
            "folder": self.folder,
            "ok": self.ok,
            "violations": [asdict(violation) for violation in self.violations],
            "config": self.config,
            "layers": layers,
        }


def inspect_checkpoint(folder: str | Path, progress: bool | None = None, *, with_spectra: bool = False) -> Inspection:
    """Check a packed checkpoint and compute its certificates. What is wrong with the files is reported, not raised.

    Every tensor is read, one at a time, those of dense layers, embeddings and norms too.

    Args:
        folder: A packed model.
        progress: Show a progress bar on stderr. Default: if it is a terminal.
        with_spectra: Measure the spectral gaps of every layer too, which takes longer than all the rest.

    Raises:
        ModelError: there is no such folder.
        CheckpointError: a file was changed while it was looked at.
    """
    check_folder(folder)
    found = Inspection(str(folder))
    try:
        found.config = read_config(folder)
        kinds = codings(found.config)
        patterns: dict[str, NMPattern | None] = {**dict.fromkeys(kinds), **pruned_patterns(found.config)}
    except CheckpointError as error:
        found.violations.append(Violation("config.json", "config", _detail(error, folder, "config.json")))
        return found
    try:
        files = weight_files(folder)
    except CheckpointError as error:
        found.violations.append(Violation("weights", "file", _detail(error, folder)))
        return found
    entries: dict[str, TensorEntry] = {}
    for file in files:
        try:
            entries |= read_headers([file])
        except CheckpointError as error:
            found.violations.append(Violation(file.name, "file", _detail(error, folder, file.name)))
    if found.violations:
        return found
    keys = stored_names(entries, patterns)
    listed = {keys[name]: (name, pattern) for name, pattern in patterns.items()}
    found.violations += [Violation(where, "not listed", problem) for where, problem in unlisted(entries, listed)]
    quiet = None if progress is None else not progress
    for key, (name, pattern) in tqdm(listed.items(), desc="Inspecting", unit="layer", disable=quiet):
        _inspect_layer(found, key, name, pattern, kinds.get(name), entries, with_spectra)
    looked_at = {f"{key}.{part}" for key in listed for part in ("weight", "weight_meta", "weight_scale")}
    others = [key for key in entries if key not in looked_at]
    for key in tqdm(others, desc="Inspecting what is dense", unit="tensor", disable=quiet):
        if not _is_finite(_read(entries, key)):
            found.violations.append(Violation(key, "values", "holds NaN or infinite values"))
    try:
        read_report(folder)
    except CheckpointError as error:
        found.violations.append(Violation(REPORT_NAME, "report", _detail(error, folder, REPORT_NAME)))
    for changed in changed_files(Path(folder)):
        detail = "its bytes are not those that were saved, by the digest in report.json; save or download it again"
        found.violations.append(Violation(changed, "digest", detail))
    return found


def _detail(error: CheckpointError, folder: str | Path, file: str = "") -> str:
    """What an error says, without the names of the folder and of the file, which the violation has."""
    said = str(error)
    for name in filter(None, (str(Path(folder) / file), str(folder), file)):
        said = said.removeprefix(f"{name}: ")
    return said.removeprefix(f"{Path(folder)}{os.sep}")  # before the name of a file that the violation does not have


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # those of eight bits have no order of their own
        tensor = tensor.to(torch.float32)
    # NaN goes through aminmax, which takes no memory.
    return all(isfinite(end) for end in torch.aminmax(tensor))


def _inspect_layer(
    found: Inspection,
    key: str,
    name: str,
    pattern: NMPattern | None,
    coding: Coding | None,
    entries: dict[str, TensorEntry],
    with_spectra: bool,
) -> None:
    problems = list(header_problems(key, pattern, entries, coding))
    if not problems:
        weight = _read(entries, f"{key}.weight")
        meta, scale = (
            _read(entries, f"{key}.{part}") if f"{key}.{part}" in entries else None
            for part in ("weight_meta", "weight_scale")
        )
        problems = list(tensor_problems(weight, meta, pattern, scale, coding))
    found.violations += [Violation(name, rule, problem) for rule, problem in problems]
    if problems or pattern is None:
        return
    assert meta is not None
    width = weight.shape[1] if coding is None else coding.held(weight.shape[1])
    in_features = width // pattern.n * pattern.m
    min_degree, band = _promised_floor(found.config)
    mask = unpack_mask(meta, in_features)
    certificate = certify(mask, pattern, extra_bands=(band,) if min_degree else ())
    if min_degree:
        holds = certificate.floors[min(band, weight.shape[0])]
        if holds < min_degree:
            detail = (
                f"config.json promises that every input keeps {min_degree} of every {band} rows, and one keeps {holds}"
            )
            found.violations.append(Violation(name, "floor", detail))
    dense_size = weight.element_size() if coding is None else _DENSE_SIZE
    if with_spectra and coding is not None and scale is not None:
        weight = decode(weight, scale, width, coding, coding.per_scale(pattern), torch.float32)
    found.layers.append(
        InspectedLayer(
            name,
            len(mask),
            in_features,
            str(pattern),
            packed_bytes=sum(entries[f"{key}.{part}"].nbytes for part in PARTS[:3] if f"{key}.{part}" in entries),
            dense_bytes=mask.numel() * dense_size,
            certificate=certificate,
            spectra=spectra(mask, unpack(weight, meta, pattern)) if with_spectra else None,
            coding=None if coding is None else str(coding),
        )
    )


def _promised_floor(config: dict[str, Any]) -> tuple[int, int]:
    """(min_degree, band) as the configuration states them; (0, 1) if it promises none."""
    min_degree, band = config.get("min_degree"), config.get("band")
    if isinstance(min_degree, int) and isinstance(band, int) and min_degree > 0 and band > 0:
        return min_degree, band
    return 0, 1


def _read(entries: dict[str, TensorEntry], key: str) -> Tensor:
    try:
        with safe_open(str(entries[key].file), framework="pt") as opened:
            return opened.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{entries[key].file}: cannot read {key} ({error}); download it again") from error
