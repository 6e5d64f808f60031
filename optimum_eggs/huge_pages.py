"""Memory in huge pages, and a model's weights in it.

A file is mapped into memory in small pages, most often of 4 kB. Decoding reads all weights once for every token; what
fetches ahead in a processor seldom crosses a page, and each has to be looked up. Huge pages are most often of 2 MB.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from .errors import OutOfMemoryError, first_line

_LINE = 64  # bytes of a line of the cache
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
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
    with suppress(OSError):  # a kernel that knows no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@torch.inference_mode(False)
@torch.no_grad()
def use_huge_pages(model: nn.Module) -> None:
    """Move the weights that `model` has on the CPU into such memory, in place; on Linux alone.

    A quarter of a gigabyte, and the weights of one kind of layers side by side, are held twice meanwhile. What a file
    was mapped to, processes share, and the system gives up when it needs the memory; this it does not. Tensors that
    share memory, with others of the model or with other processes, stay where they are, and so do those that are no
    plain ones.

    Raises:
        OutOfMemoryError: there is not enough memory. Weights that were not reached stay where they were.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for piece in _pieces(model):
        starts = [0]
        for run in piece:
            starts.append(starts[-1] + -(-_size(run) // _LINE) * _LINE)
        memory = huge_memory(starts[-1])
        for run, start in zip(piece, starts, strict=False):
            for tensor in run:
                room = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
                tensor.data = room.view(tensor.shape).copy_(tensor)
                start += tensor.nbytes


def _size(run: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in run)


def _pieces(model: nn.Module) -> Iterator[Sequence[Sequence[Tensor]]]:
    """The runs to move, those that go into one piece of memory together."""
    piece: list[list[Tensor]] = []
    size = 0
    for run in _runs(model):
        piece.append(run)
        size += _size(run)
        if size >= _TOGETHER:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _runs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The parameters and buffers to move, each once, in the order of the model; those to lie side by side together.

    These are weights of layers side by side whose rows are alike, and so with all else that is stored by rows: layers
    of the same inputs, such as q, k and v, are one matrix then.
    """
    plain = [each for each in (*model.parameters(), *model.buffers()) if _is_plain(each)]
    users = Counter(each.untyped_storage().data_ptr() for each in plain)
    left = {id(each) for each in plain if _is_whole(each) and users[each.untyped_storage().data_ptr()] == 1}
    for siblings in ([model], *(module.children() for module in model.modules())):
        runs: dict[object, list[Tensor]] = {}
        for module in siblings:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if id(tensor) in left:
                    left.remove(id(tensor))
                    runs.setdefault((name, tensor.dtype, tensor.shape[1:]), []).append(tensor)
        yield from runs.values()


def _is_whole(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0 and not tensor.is_shared()


def _is_plain(tensor: Tensor) -> bool:
    known = tensor.dtype.is_floating_point or tensor.dtype in _INTEGERS
    return type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided and known
