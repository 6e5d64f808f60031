"""Memory that cannot be had, said in the words of whoever asked for the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import EGGSError, OutOfMemoryError, first_line, is_out_of_memory


@contextmanager
def enough_memory(*arguments: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of any library that says that memory is out into one that names what to change.

    Args:
        arguments: Names of the arguments that take less memory if they are smaller.
        remedy: What else there is.

    Raises:
        OutOfMemoryError: memory was out within. The library's own error is its cause.

    >>> with enough_memory("batch_size", "seq_len"):
    ...     raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    Traceback (most recent call last):
    optimum_eggs.errors.OutOfMemoryError: there is not enough memory (DefaultCPUAllocator: can't allocate memory: you \
tried to allocate 8 bytes); give a smaller batch_size or seq_len
    """
    try:
        yield
    except EGGSError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = [f"give a smaller {' or '.join(arguments)}"] if arguments else []
        ways += [remedy] if remedy else []
        if on_accelerator(error):
            ways.append("use device='cpu'")
        raise OutOfMemoryError(f"there is not enough memory ({first_line(error)}); {', or '.join(ways)}") from error


def on_accelerator(error: BaseException) -> bool:
    """Whether the memory that was out is that of an accelerator: torch has a type for it, and CUDA's libraries a word.

    >>> on_accelerator(MemoryError()), on_accelerator(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    (False, True)
    """
    of_torch = type(error).__name__ == "OutOfMemoryError" and not isinstance(error, EGGSError)
    return of_torch or "STATUS_ALLOC_FAILED" in str(error)
