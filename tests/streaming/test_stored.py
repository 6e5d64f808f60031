"""Tensors of safetensors files are read into memory of their own, and nothing of a file stays mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimum_eggs.errors import CheckpointError
from optimum_eggs.streaming.stored import DTYPES, stored_tensors

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.fixture
def file(tmp_path):
    values = {f"float {dtype}": torch.randn(3, 5).to(dtype) for dtype in FLOATS}
    values |= {f"whole {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES.values() if dtype not in FLOATS}
    values |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "large": torch.randn(1000, 100)}
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors", values


def test_every_dtype_and_shape_is_what_was_saved(file):
    path, values = file
    stored = stored_tensors(path, values)
    for name, value in values.items():
        read = stored[name][...]
        assert (read.dtype, list(read.shape)) == (value.dtype, stored[name].get_shape())
        assert read.untyped_storage().nbytes() == value.nbytes
        assert torch.equal(read.float(), value.float())
        assert DTYPES[stored[name].get_dtype()] is value.dtype
    assert torch.equal(stored["large"][10:20, 3], values["large"][10:20, 3])
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


def test_a_file_that_ends_early_or_has_changed_is_named(file):
    path, values = file
    stored = stored_tensors(path, values)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within large; download it again"):
        stored["large"][...]
    path.write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(CheckpointError, match="is not what it was a moment ago"):
        stored_tensors(path, values)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what it was a moment ago"):
        stored_tensors(path, ["another"])


def test_a_dtype_that_is_unknown_is_named(file):
    path, _ = file
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F64"', b'"F99"'))
    with pytest.raises(CheckpointError, match="has dtype F99, which is unknown here"):
        stored_tensors(path, ["float torch.float64"])["float torch.float64"][...]
