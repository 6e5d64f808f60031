"""Where the hidden states of a calibration text are: on the device, in the host's memory, or on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHARE = 8  # of the device's free memory, a list may take one part: there are up to four, or two and a block is tuned


class _States(MutableSequence):
    """A list of tensors that are kept in another place; reading one makes a new tensor where it was."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    @abstractmethod
    def _read(self, index: int) -> Tensor:
        """The tensor at `index`."""

    @abstractmethod
    def _write(self, index: int, value: Tensor) -> Any:
        """Keep `value`. Returns what is needed to read it."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._read(range(len(self))[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        index = range(len(self))[index]
        self._kept[index] = self._write(index, value)

    def insert(self, index: int, value: Tensor) -> None:
        """Append: `index` must be the length."""
        if index != len(self):
            raise IndexError("hidden states are appended, not inserted")
        self._kept.append(self._write(index, value))

    def __delitem__(self, index: Any) -> None:
        raise TypeError("hidden states are replaced, not deleted")


class StatesOnHost(_States):
    """A list of tensors of a GPU, each pinned in the host's memory; reading one makes a new tensor on its device.

    Copies are asynchronous both ways. They are in order, as they and what computes the tensors are on one stream, the
    device's current one: what is read was written before, and is written again after it was read. The host itself never
    looks at what is pinned.

    torch rounds what it pins up to a power of two. Tensors of the CPU are copied, and not pinned.

    >>> states = StatesOnHost()
    >>> states.append(torch.ones(2, dtype=torch.bfloat16))
    >>> states[0] = states[0] + 1
    >>> states[-1], len(states)
    (tensor([2., 2.], dtype=torch.bfloat16), 1)
    """

    def _read(self, index: int) -> Tensor:
        held, device = self._kept[index]
        return held.to(device, non_blocking=True, copy=True)

    def _write(self, index: int, value: Tensor) -> tuple[Tensor, torch.device]:
        held, device = self._kept[index] if index < len(self) else (None, None)
        if held is None or (held.shape, held.dtype, device) != (value.shape, value.dtype, value.device):
            held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return held.copy_(value.detach(), non_blocking=True), value.device


class StatesOnDisk(_States):
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
        super().__init__()
        self._folder = Path(tempfile.mkdtemp(prefix="states-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def _read(self, index: int) -> Tensor:
        shape, dtype, device = self._kept[index]
        data = bytearray(self._file(index).read_bytes())
        return torch.frombuffer(data, dtype=dtype).reshape(shape).to(device)

    def _write(self, index: int, value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        bits.numpy().tofile(self._file(index))
        return value.shape, value.dtype, value.device

    def _file(self, index: int) -> Path:
        return self._folder / str(index)


def states_in_memory(size: int, device: torch.device) -> MutableSequence[Tensor]:
    """A list for `size` bytes of hidden states that `device` computes.

    They stay there, if they take at most an eighth of the memory that is free there now; else the host holds them.
    """
    free = free_bytes(device)
    return [] if free is None or size <= free // _SHARE else StatesOnHost()


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that this process can have: free ones, and those that torch keeps for it unused.

    None of other devices: a CPU has one memory for all, and is not asked.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
