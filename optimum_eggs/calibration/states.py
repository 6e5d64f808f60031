"""Hidden states on disk, for calibration streams that memory does not hold."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StatesOnDisk(MutableSequence):
    """A list of tensors, each in a file of its own; reading one makes a new tensor. The files go with the list.

    Args:
        parent: Folder to make the files in.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     states = StatesOnDisk(folder)
    ...     states.append(torch.ones(2, dtype=torch.bfloat16))
    ...     states[0] = states[0] + 1
    ...     states[-1], len(states)
    (tensor([2., 2.], dtype=torch.bfloat16), 1)
    """

    def __init__(self, parent: str | Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="states-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._like: list[tuple[torch.Size, torch.dtype, torch.device]] = []

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, index: Any) -> Any:
        shape, dtype, device = self._like[index]
        data = bytearray(self._file(range(len(self))[index]).read_bytes())
        return torch.frombuffer(data, dtype=dtype).reshape(shape).to(device)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._like[index] = self._write(range(len(self))[index], value)

    def insert(self, index: int, value: Tensor) -> None:
        """Append: `index` must be the length."""
        if index != len(self):
            raise IndexError("hidden states are appended, not inserted")
        self._like.append(self._write(index, value))

    def __delitem__(self, index: Any) -> None:
        raise TypeError("hidden states are replaced, not deleted")

    def _write(self, index: int, value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        bits.numpy().tofile(self._file(index))
        return value.shape, value.dtype, value.device

    def _file(self, index: int) -> Path:
        return self._folder / str(index)
