"""Tensors of safetensors files, read one by one into memory of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header."""


class StoredTensor:
    """What transformers takes for a slice of an open safetensors file: read when it is asked for.

    safetensors maps the file. What has been read of it then counts as resident memory beside the copy that is made,
    for as long as the file is open.

    Args:
        file: A safetensors file whose header was found to be whole.
        name: Of the tensor.
        entry: What the header says of it.
        begin: Where the header ends.
    """

    def __init__(self, file: Path, name: str, entry: dict[str, Any], begin: int) -> None:
        self.file, self.name = file, name
        self._shape, self._dtype = list(entry["shape"]), entry["dtype"]
        first, last = entry["data_offsets"]
        self._start, self._size = begin + first, last - first

    def get_shape(self) -> list[int]:
        """Of the whole tensor."""
        return self._shape

    def get_dtype(self) -> str:
        """As the header has it."""
        return self._dtype

    def __getitem__(self, index: Any) -> Tensor:
        if self._dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: {self.name} has dtype {self._dtype}, which is unknown here")
        data = torch.empty(self._size, dtype=torch.uint8)
        left = data.numpy().data
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self._start)
            while left:
                count = opened.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.file}: ends within {self.name}; download it again")
                left = left[count:]
        return data.view(DTYPES[self._dtype]).reshape(self._shape)[index]


def stored_tensors(file: Path, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Some tensors of a safetensors file whose header was found to be whole, by name."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
    try:
        entries = json.loads(header)
        return {name: StoredTensor(file, name, entries[name], 8 + length) for name in names}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file}: is not what it was a moment ago ({error}); start again") from error
