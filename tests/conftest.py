from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# The tests run in as many processes as there are cores; threads beyond them wait for each other. For what is started.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny
import torch
from forks import Forks
from hypothesis import settings
from unprivileged import can_become_ordinary

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.ops import force

ROOT = Path(__file__).parents[1]

settings.register_profile("quick", max_examples=10)
settings.register_profile("ci", max_examples=40)
settings.load_profile("quick")  # `--hypothesis-profile` is heeded after this


def pytest_configure(config):
    if version("pandas").startswith("2."):  # the newest for Python 3.10; it lets go of files late
        late = r"ignore:Exception ignored in. <_io.FileIO \[closed\]>:pytest.PytestUnraisableExceptionWarning"
        config.addinivalue_line("filterwarnings", late)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tiny matrices: more threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interrupts():
    # A shell's background jobs ignore them, and so does whatever is started by one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unprivileged():
    """For tests whose runs call `become_ordinary`."""
    if not can_become_ordinary():
        pytest.skip("root cannot give up what it may do here")


@pytest.fixture
def reference_backend():
    """Packed layers compute as the dense ones do, bit for bit."""
    with force("reference"):
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.make_text(4000))
    return path


@pytest.fixture
def config():
    """A configuration that fits the tiny models."""
    return EGGSConfig("2:4", num_samples=8, seq_len=16, band=8)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory, tokenizer):
    """A dense tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    tiny.make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory, dense_folder, text_file):
    """The same, pruned and packed."""
    folder = tmp_path_factory.mktemp("packed") / "llama"
    pruner = EGGSPruner.from_pretrained(dense_folder)
    pruner.prune(EGGSConfig("2:4", num_samples=8, seq_len=16, band=8, batch_size=3), calibration=text_file)
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forks():
    """Runs in processes of their own that are begun at once."""
    with Forks() as made:
        yield made


@pytest.fixture(scope="session")
def python():
    return sys.executable
