"""Sums of products of inputs, whatever their dtype and device."""

from __future__ import annotations

import pytest
import torch
from oracles import gaussian
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.calibration.statistics import multiplies_halves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_products_of_one_token_are_exact_and_their_sum_is_float32(dtype):
    statistics = GramAccumulator(64, CPU)
    for seed in range(2):
        x = gaussian(1, 64, seed=seed, dtype=dtype)
        statistics.add(x)
        if seed == 0:
            exact = (x.double().T @ x.double()).to(torch.float32)
            assert torch.equal(statistics.gram, exact)
    assert statistics.gram.dtype == torch.float32
    assert statistics.tokens == 2


@pytest.mark.parametrize("width", [5, 256, 257, 600])
def test_strips_of_columns_make_the_whole_sum(width):
    statistics, x = GramAccumulator(width, CPU), gaussian(3, 7, width)
    for part in x:
        statistics.add(part)
        before = statistics.gram.clone()  # asked for in between
    exact = x.flatten(0, 1).double()
    assert torch.equal(statistics.gram, statistics.gram.t())
    assert torch.equal(statistics.gram, before)
    torch.testing.assert_close(statistics.gram.double(), exact.t() @ exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_multiplied_as_they_are_where_the_device_can(dtype, monkeypatch):
    assert multiplies_halves(GPU, dtype)
    assert not multiplies_halves(CPU, dtype)
    assert not multiplies_halves(GPU, torch.float32)
    assert not multiplies_halves(GPU, torch.float64)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not multiplies_halves(GPU, dtype)


class Calls(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("dtype", "copied"), [(torch.bfloat16, False), (torch.float16, False), (torch.float64, True)])
def test_on_a_gpu_halves_are_not_copied_to_float32(dtype, copied):
    with FakeTensorMode(), Calls() as calls:  # tensors without values, of a GPU that need not be there
        statistics = GramAccumulator(8, GPU)
        statistics.add(torch.empty(2, 5, 8, dtype=dtype, device=GPU))
        assert (statistics.gram.device, statistics.gram.dtype, statistics.gram.shape) == (GPU, torch.float32, (8, 8))
    assert ("aten._to_copy.default" in calls.names) == copied
    assert ("aten.mm.dtype" in calls.names) == (not copied)
