"""Memory in huge pages, and a model's weights in it.

A file is mapped into memory in pages of 4 kB. Decoding reads all weights once for every token; a processor fetches
ahead within a page alone, and has to look up where each page lies. Pages of 2 MB are five hundred times fewer.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .errors import OutOfMemoryError, first_line

_LINE = 64  # bytes of a line of the cache
_TOGETHER = 1 << 28  # bytes in one piece of memory, which is freed with the last tensor in it


def huge_memory(size: int) -> Tensor:
    """Zeros, (size,), of bytes, in memory for which huge pages are asked: of Linux alone, which gives what it has.

    Raises:
        OutOfMemoryError: there is not enough memory.

    >>> int(huge_memory(3).sum())
    0
    """
    try:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(size, dtype=torch.uint8)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, RuntimeError) as error:
        raise OutOfMemoryError(f"there is not enough memory for {size} bytes ({first_line(error)})") from error
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@torch.no_grad()
def use_huge_pages(model: nn.Module) -> None:
    """Move the weights that `model` has on the CPU into such memory, in place.

    A quarter of a gigabyte or one tensor is held twice meanwhile; what the system keeps of a file that was mapped, it
    gives up when it needs the memory. Tensors that share memory with others, or are no plain ones, stay.

    Raises:
        OutOfMemoryError: there is not enough memory. Weights that were not reached stay where they were.
    """
    for piece in _pieces(model):
        starts = [0]
        for tensor in piece:
            starts.append(starts[-1] + -(-tensor.nbytes // _LINE) * _LINE)
        memory = huge_memory(starts[-1])
        for tensor, start in zip(piece, starts, strict=False):
            room = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
            tensor.data = room.view(tensor.shape).copy_(tensor)


def _pieces(model: nn.Module) -> Iterator[Sequence[Tensor]]:
    """The parameters and buffers to move, each once, in the order of the model."""
    tensors = [each for each in (*model.parameters(), *model.buffers()) if _is_plain(each)]
    users = Counter(each.untyped_storage().data_ptr() for each in tensors)
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if users[storage.data_ptr()] > 1 or storage.nbytes() != tensor.nbytes:
            continue
        piece.append(tensor)
        size += tensor.nbytes
        if size >= _TOGETHER:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor.data) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() and tensor.numel() > 0
