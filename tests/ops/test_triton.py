import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from optimum_eggs.errors import ConfigError
from optimum_eggs.ops import choose, force, triton

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs: pip install triton")


@needs_triton
@pytest.mark.slow
def test_the_kernel_is_right_up_to_rounding_in_the_interpreter():
    script = Path(__file__).with_name("triton_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["90"]


@needs_triton
def test_the_kernel_is_launched_on_the_device_of_its_input(monkeypatch):
    from optimum_eggs.ops.triton import decode

    events = []

    @contextmanager
    def device_of(tensor):
        events.append(tensor)
        yield
        events.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: events.append("launched")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(decode, "_kernel", Kernel())
    x = torch.zeros(1, 8)
    decode.decode(x, torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.uint8), None, 2, 4)
    assert events[0] is x
    assert events[1:] == ["launched", "left"]


@needs_triton
def test_it_runs_on_a_gpu_when_asked_for_and_not_otherwise():
    gpu = torch.device("cuda")
    assert choose(torch.bfloat16, gpu, 1).backend == "dense"
    with force("triton"):
        assert choose(torch.bfloat16, gpu, 1).backend == "triton"
        assert choose(torch.bfloat16, gpu, 64).backend == "reference"
        assert choose(torch.float64, gpu, 1).backend == "reference"
        assert choose(torch.bfloat16, torch.device("cpu"), 1).backend == "reference"


def test_it_cannot_be_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "not installed")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run: not installed"), force("triton"):
        pass
