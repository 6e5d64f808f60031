"""Writing a checkpoint part by part, in files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..files import sync
from ..packing.checkpoint import INDEX_NAME, WEIGHTS_NAME

JOINED = 256 * 2**20
"""Bytes up to which parts share a file: what is in memory while it is written."""


class Shards:
    """Collects tensors into safetensors files of up to `limit` bytes; a tensor that is larger has a file of its own.

    One file is called as transformers calls it; several are numbered, and an index says where each tensor is.
    `huggingface_hub.split_torch_state_dict_into_shards` makes the same of a whole state dict; here the sizes are only
    known one block after the other, since a layer may be left dense.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._size = 0
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add a part. It is kept until the file that it goes to is full."""
        if self._size and self._size + sum(value.nbytes for value in tensors.values()) > self.limit:
            self._write()
        for name, value in tensors.items():
            if self._size and self._size + value.nbytes > self.limit:
                self._write()
            self._held[name] = value.detach().cpu().contiguous()
            self._size += value.nbytes
        if self._size >= self.limit:  # nothing more goes with it
            self._write()

    def close(self) -> None:
        """Write what is left, name the files, and write the index."""
        if self._held:
            self._write()
        count = len(self._names)
        if count == 1:
            self._part(0).rename(self.folder / WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        part = self._part(len(self._names))
        save_file(self._held, part, metadata={"format": "pt"})
        sync(part)
        self._names.append(list(self._held))
        self._total += self._size
        self._held, self._size = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"
