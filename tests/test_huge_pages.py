import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_eggs import compile_generation, huge_pages
from optimum_eggs.errors import OutOfMemoryError
from optimum_eggs.huge_pages import huge_memory, use_huge_pages

SMAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(
    not (hasattr(mmap, "MADV_HUGEPAGE") and SMAPS.exists() and "VmFlags" in SMAPS.read_text())
    or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""),  # which asks of all memory
    reason="whether huge pages are asked is not to be seen",
)


def mappings():
    """Address ranges of this process, and their flags."""
    found, here = {}, None
    with SMAPS.open() as lines:
        for line in lines:
            first, *rest = line.split()
            if first == "VmFlags:":
                found[here] = rest
            elif not first.endswith(":"):
                here = tuple(int(each, 16) for each in first.split("-"))
    return found


def flags(address):
    return next((found for (low, high), found in mappings().items() if low <= address < high), None)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(512, 300), nn.Linear(300, 512, bias=False)
        self.tied = nn.Linear(300, 512, bias=False)
        self.tied.weight = self.second.weight
        self.register_buffer("bits", torch.randint(256, (5, 7), dtype=torch.uint8))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("elsewhere", torch.empty(4, device="meta"))
        self.register_buffer("strided", torch.arange(12.0).view(3, 4).t())


@linux
@pytest.mark.parametrize("together", [1 << 28, 1])
def test_weights_are_moved_as_they_are(monkeypatch, together):
    monkeypatch.setattr(huge_pages, "_TOGETHER", together)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, x = list(model.parameters()), torch.randn(2, 512)
    expected = model.second(model.first(x)).detach()
    use_huge_pages(model)
    for name, value in model.state_dict().items():
        assert value.device == before[name].device
        assert value.device.type == "meta" or torch.equal(value, before[name])
    assert all(now is then and now.requires_grad for now, then in zip(model.parameters(), parameters, strict=True))
    assert model.tied.weight is model.second.weight
    for moved in (model.first.weight, model.first.bias, model.second.weight, model.bits):
        assert "hg" in flags(moved.data_ptr())
        assert moved.data_ptr() % 64 == 0
        assert moved.untyped_storage().nbytes() == moved.nbytes  # what is saved is no more than it
    assert torch.equal(model.second(model.first(x)), expected)


@linux
def test_compiled_generation_uses_them_and_saves_the_same(packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    compile_generation(model)
    assert all("hg" in flags(weight.data_ptr()) for weight in model.parameters())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (packed_folder / "model.safetensors").read_bytes()


@linux
def test_memory_is_freed_with_the_last_tensor_in_it():
    model = Model()
    use_huge_pages(model)
    where = model.first.weight.data_ptr()
    del model.first, model.bits
    gc.collect()
    assert "hg" in flags(where)
    model.second.weight = model.tied.weight = None
    gc.collect()
    assert flags(where) is None or "hg" not in flags(where)


def test_tensors_that_share_memory_stay_where_they_are():
    model, both, whole = nn.Module(), torch.zeros(6), torch.zeros(2, 3)
    model.register_buffer("low", both[:4])
    model.register_buffer("high", both[2:])
    model.first, model.second = nn.Parameter(whole), nn.Parameter(whole)
    model.register_buffer("turned", whole.t())
    model.register_buffer("of_all", torch.zeros(5).share_memory_())
    use_huge_pages(model)
    model.low[3] = 1
    assert model.high.tolist() == [0, 1, 0, 0]
    with torch.no_grad():
        model.first[1, 0] = 2
    assert model.second[1, 0] == model.turned[0, 1] == 2
    assert model.of_all.is_shared()


def test_moved_weights_can_be_trained_whatever_the_mode_they_were_moved_in():
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        use_huge_pages(model)
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight.grad, torch.ones(3, 4))


@linux
def test_a_kernel_without_huge_pages_gives_common_memory(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # which no kernel knows
    assert huge_memory(5).tolist() == [0] * 5


def test_out_of_memory_is_said_and_leaves_a_whole_model(monkeypatch):
    model, calls = Model(), []

    def once(size):
        if calls:
            raise OutOfMemoryError("no more")
        calls.append(size)
        return huge_memory(size)

    monkeypatch.setattr(huge_pages, "_TOGETHER", 1)
    monkeypatch.setattr(huge_pages, "huge_memory", once)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(OutOfMemoryError):
        use_huge_pages(model)
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(OutOfMemoryError, match="not enough memory for 1152921504606846976 bytes"):
        huge_memory(1 << 60)


def test_other_systems_get_common_memory(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    model = Model()
    expected = model.first.weight.clone()
    use_huge_pages(model)
    assert torch.equal(model.first.weight, expected)
    assert huge_memory(5).tolist() == [0] * 5
