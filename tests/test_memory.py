"""Memory that is out is named by every function, with the arguments that take less of it."""

from __future__ import annotations

import importlib

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.errors import EGGSError, OutOfMemoryError
from optimum_eggs.evaluation import evaluate
from optimum_eggs.memory import enough_memory
from optimum_eggs.recovery.recover import RecoverySettings, recover
from optimum_eggs.speed.models import time_models
from optimum_eggs.streaming import prune_checkpoint

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB."
GPU = torch.OutOfMemoryError(f"{SAID}\nMore follows")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")
TEXT = [tiny.make_text()]
CONFIG = EGGSConfig("2:4", num_samples=8, seq_len=16, calibration=TEXT)
CALLS = {
    "optimum_eggs.engine.prune.prune_blocks": (
        lambda model, out, text: EGGSPruner.from_pretrained(model).prune(CONFIG),
        "give a smaller batch_size or seq_len or num_samples, or prune from disk (optimum-cli eggs prune)",
    ),
    "optimum_eggs.engine.pack._recognise": (
        lambda model, out, text: EGGSPruner.from_pretrained(model).pack(),
        "use a machine that has more",
    ),
    "optimum_eggs.streaming.prune.prune_blocks": (
        lambda model, out, text: prune_checkpoint(model, out, CONFIG),
        "give a smaller batch_size or seq_len or num_samples or memory_budget",
    ),
    "optimum_eggs.evaluation.evaluate.load_model": (
        lambda model, out, text: evaluate(model, text=TEXT, seq_len=16),
        "give a smaller batch_size or seq_len",
    ),
    "optimum_eggs.recovery.recover.load_model": (
        lambda model, out, text: recover(model, out, RecoverySettings([str(text)], seq_len=16)),
        "give a smaller batch_size or seq_len",
    ),
    "optimum_eggs.speed.models._load_and_use": (
        lambda model, out, text: time_models([model], prompt=8, new_tokens=2),
        "give a smaller prompt, or time fewer models at once",
    ),
}


@pytest.mark.parametrize("within", list(CALLS))
def test_what_takes_less_memory_is_named(within, dense_folder, text_file, tmp_path, monkeypatch):
    def is_out(*args, **kwargs):
        raise GPU

    call, remedy = CALLS[within]
    module, _, function = within.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), function, is_out)
    with pytest.raises(OutOfMemoryError) as found:
        call(dense_folder, tmp_path / "out", text_file)
    assert str(found.value) == f"there is not enough memory ({SAID}); {remedy}, or use device='cpu'"
    assert found.value.__cause__ is GPU
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [HOST, MemoryError()], ids=["torch", "python"])
def test_the_memory_of_the_machine_has_no_other_device(error):
    with pytest.raises(OutOfMemoryError, match=r"give a smaller batch_size$") as found, enough_memory("batch_size"):
        raise error
    assert found.value.__cause__ is error


@pytest.mark.parametrize("library", ["CUDA error: CUBLAS", "cusolver error: CUSOLVER"])
def test_the_libraries_of_a_gpu_run_out_of_memory_too(library):
    words = f"{library}_STATUS_ALLOC_FAILED when calling `create(handle)`"
    with pytest.raises(OutOfMemoryError, match="smaller batch_size, or use device='cpu'"), enough_memory("batch_size"):
        raise RuntimeError(words)


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("mat1 and mat2"), EGGSError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, enough_memory("batch_size"):
            raise error
        assert found.value is error
