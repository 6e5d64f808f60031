"""Several processes that prune one model together: the calibration windows shared out, and the layers to be solved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, DistributedError, EGGSError, first_line

T = TypeVar("T")

_PATIENCE = timedelta(days=30)


class ToldError(Exception):
    """`error` went wrong in another process while this one was waiting for it; they may try again together."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class LeftError(ToldError):
    """`error` ended what was done `together`, in another process."""


@dataclass(frozen=True)
class _Told:
    error: Exception


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them; one alone by default, for which nothing here costs anything.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        device: Where tensors that are sent must be; the CPU for gloo, the process's GPU for NCCL.
    """

    rank: int = 0
    size: int = 1
    device: str | torch.device = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def check(self, num_samples: int, batch_size: int, generated_samples: int = 0) -> None:
        """Raise unless every process gets the same number of windows of every batch.

        Args:
            num_samples: Windows of text.
            batch_size: Windows in a batch.
            generated_samples: Windows that the model writes, which follow those of text.

        Raises:
            ConfigError: they cannot be shared out evenly.
        """
        windows = "num_samples + generated_samples" if generated_samples else "num_samples"
        for name, value in (("batch_size", batch_size), (windows, num_samples + generated_samples)):
            if value % self.size:
                raise ConfigError(
                    f"{name}={value} cannot be shared out evenly over {self.size} processes; use a multiple of them"
                )

    def share(self, batch: Tensor) -> Tensor:
        """This process's windows of a batch (windows, tokens), which [`check`] found to be shared out evenly.

        >>> Ranks(1, 2).share(torch.arange(8).view(4, 2))[:, 0]
        tensor([4, 6])
        """
        return batch.chunk(self.size)[self.rank]

    def deal(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Who does each of several pieces of work, so that no one has much more than the others.

        >>> Ranks(0, 2).deal({"q": 4, "k": 1, "v": 1, "o": 4})
        {'q': 0, 'o': 1, 'k': 0, 'v': 1}
        """
        load, owner = [0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owner[name] = load.index(min(load))
            load[owner[name]] += costs[name]
        return owner

    def mine(self, costs: Mapping[str, int]) -> list[str]:
        """What of it this process does."""
        return [name for name, owner in self.deal(costs).items() if owner == self.rank]

    def rows(self, rows: int, band: int) -> list[slice]:
        """The rows of a layer that each process solves: whole bands, of which the last takes the remainder.

        >>> Ranks(0, 2).rows(50, 16), Ranks(0, 3).rows(20, 16)
        ([slice(0, 32, None), slice(32, 50, None)], [slice(0, 20, None), slice(20, 20, None), slice(20, 20, None)])
        """
        whole = max(1, rows // band)
        ends = [-(-whole * rank // self.size) for rank in range(self.size + 1)]
        cuts = [rows if end == whole else end * band for end in ends]
        return [slice(start, stop) for start, stop in pairwise(cuts)]

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes. Its bits are the same in all of them."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.to(self.device).contiguous()
            with _lost():
                dist.all_reduce(sent)
            tensor.copy_(sent)

    def copy_from(self, rank: int, *tensors: Tensor) -> None:
        """Replace each tensor by that of one process."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.to(self.device).contiguous()
            with _lost():
                dist.broadcast(sent, rank)
            tensor.copy_(sent)

    def gather(self, value: T) -> list[T]:
        """The value that each process has, in the order of their numbers."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(found, value)
        return found

    def merge(self, parts: Mapping[str, T]) -> dict[str, T]:
        """The entries of all processes' mappings."""
        return {key: value for part in self.gather(dict(parts)) for key, value in part.items()}

    def agree(self, value: T) -> list[T]:
        """As `gather`, within `together`; but what another process tells of instead is raised here.

        Raises:
            ToldError: another process tells of an error.
            LeftError: another process has ended with one.
        """
        found = self._unless_left(value)
        for each in found:
            if isinstance(each, _Told):
                raise ToldError(each.error)
        return found

    def tell(self, error: Exception) -> None:
        """Tell the others, where they `agree`, of what went wrong here.

        Raises:
            LeftError: another process has ended with an error.
        """
        if self.size > 1:
            self._unless_left(_Told(self._sendable(error)))

    def _unless_left(self, value: Any) -> list[Any]:
        """As `gather`, unless the others have left what is done `together`."""
        found = self.gather(value)
        for each in found:
            if isinstance(each, Exception):
                raise LeftError(each)
        return found

    def _sendable(self, error: Exception) -> Exception:
        """An error that survives being sent."""
        if isinstance(error, EGGSError | OSError):
            return error
        return DistributedError(f"process {self.rank}: {type(error).__name__}: {error}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise what any process raises within in all of them: that of the first one that failed."""
        error: Exception | None = None
        try:
            yield
        except DistributedError:
            raise  # there is no one to tell
        except LeftError as left:
            raise left.error from None  # the others know
        except Exception as found:  # whatever it is, the others must not wait for ever
            if self.size == 1:
                raise
            error = found
        if self.size > 1:
            sent = None if error is None else self._sendable(error)
            failed = [found for found in self.gather(sent) if found is not None]
            if error is not None:
                raise error
            if failed:
                raise failed[0]

    def hide_bar(self, progress: bool | None) -> bool | None:
        """What tqdm's `disable` should be: on in the first process only; None lets tqdm ask if stderr is a terminal."""
        return True if not self.first else None if progress is None else not progress


ALONE = Ranks()


def join_ranks(cpu: bool = False) -> Ranks:
    """The processes that `torchrun` or `accelerate launch` started, this one among them; itself, if it is alone.

    With `cpu`, they work there, whatever else there is.
    """
    from accelerate import PartialState

    # A process that is gone closes its connections; one that solves a large layer keeps the others waiting for hours.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=_PATIENCE)
    if state.num_processes == 1:
        return ALONE
    return Ranks(state.process_index, state.num_processes, state.device)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"the exchange with the other processes failed ({first_line(error)}), one of them may be gone: see what "
            "each printed; the same command goes on behind the last finished block"
        ) from error
