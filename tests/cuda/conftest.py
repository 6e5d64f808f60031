"""What a GPU does, against what the CPU does; skipped where there is no GPU.

`OPTIMUM_EGGS_TEST_DEVICE=cpu pytest tests/cuda` runs them without one, which shows mistakes in the tests alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def device():
    """Where the tests run."""
    name = os.environ.get("OPTIMUM_EGGS_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture(scope="session")
def second_device(device):
    """Another GPU, which is not the current one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    return torch.device(device.type, 1)
