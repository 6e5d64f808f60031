"""Factors that several processes find together, here threads in their place."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import pytest
import torch
from oracles import gaussian

from optimum_eggs.errors import NumericalError
from optimum_eggs.ranks import ALONE, Ranks, ToldError
from optimum_eggs.update import Problem, factor


@dataclass
class Meeting:
    """Where threads exchange what they have."""

    size: int
    sent: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = Barrier(self.size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.sent[rank] = value
        self.barrier.wait()
        found = [self.sent[each] for each in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Thread(Ranks):
    meeting: Any = None

    def gather(self, value):
        return self.meeting.exchange(self.rank, value)

    def copy_from(self, rank, *tensors):
        for tensor in tensors:
            tensor.copy_(self.meeting.exchange(self.rank, tensor.clone())[rank])


def together(size, work):
    """What each of so many threads gives."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, size, meeting=meeting) for rank in range(size)]))


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setattr(factor, "_COLUMNS", 16)


def definite(inputs, dtype=torch.float64):
    x = gaussian(inputs, 2 * inputs).to(dtype)
    return x @ x.t()


@pytest.mark.parametrize("inputs", [7, 16, 90])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_each_of_several_has_the_factor_and_its_inverse(inputs, size):
    matrix = definite(inputs)
    wanted = torch.linalg.cholesky(matrix)
    own = [matrix.clone() for _ in range(size)]
    found = together(size, lambda ranks: factor.cholesky(own[ranks.rank], ranks)) if size > 1 else []
    found = found or [factor.cholesky(own[0], ALONE)]
    for lower, storage in zip(found, own, strict=True):
        assert torch.equal(lower, found[0])
        assert lower.data_ptr() == storage.data_ptr()  # in its place
        torch.testing.assert_close(lower, wanted)
        assert torch.equal(lower, lower.tril())
    inverses = together(size, lambda ranks: factor.invert(found[ranks.rank], ranks)) if size > 1 else []
    inverses = inverses or [factor.invert(found[0], ALONE)]
    for inverse in inverses:
        assert torch.equal(inverse, inverses[0])
        torch.testing.assert_close(inverse @ wanted, torch.eye(inputs, dtype=torch.float64))


def test_a_process_does_its_share(monkeypatch):
    """Of 8 blocks of columns each of two factorises four."""
    seen, plain = [], torch.linalg.cholesky

    def counted(matrix, **kwargs):
        seen.append(threading.get_ident())
        return plain(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky", counted)
    together(2, lambda ranks: factor.cholesky(definite(128), ranks))
    assert seen[::2] == [seen[0]] * 4  # in turns
    assert seen[1::2] == [seen[1]] * 4
    assert seen[0] != seen[1]


@pytest.mark.parametrize("at", [0, 20, 89])
def test_all_hear_that_a_matrix_is_not_definite(at):
    matrix = definite(90)
    matrix[at, at] = -1

    def work(ranks):
        try:
            return Problem(matrix, 0, ranks).penalised(1e-9)
        except ToldError as told:
            return told.error
        except NumericalError as error:
            ranks.tell(error)
            return error

    assert [type(error) for error in together(3, work)] == [NumericalError] * 3
