"""Models that transformers splits over processes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from optimum_eggs import EGGSConfig
from optimum_eggs.errors import ModelError
from optimum_eggs.hf.quantizer import EGGSHfQuantizer

needs_sizes = pytest.mark.skipif(
    "tp_size" not in inspect.signature(DistributedConfig).parameters, reason="needs a later transformers"
)
slow = pytest.mark.slow  # two processes


@pytest.fixture(scope="module")
def found(tmp_path_factory, packed_folder, dense_folder):
    """What two processes came to."""
    results = tmp_path_factory.mktemp("parallel") / "results.json"
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(packed_folder), str(dense_folder), str(results)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


@slow
@needs_sizes
@pytest.mark.parametrize("way", ["packed tp_plan", "packed tp_size"])
def test_a_tensor_parallel_plan_is_refused_for_packed_layers(way, found):
    assert found[way].startswith("ModelError: tp_size=2 would split packed layers")
    assert "device_map" in found[way]
    assert "eggs export" in found[way]


@slow
@needs_sizes
def test_a_packed_model_may_be_sharded(found, packed_folder):
    ids = torch.randint(4, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = float(AutoModelForCausalLM.from_pretrained(packed_folder)(ids).logits.sum())
    assert found["packed fsdp_size"] == pytest.approx(expected, rel=1e-4, abs=1e-2)


@slow
@needs_sizes
@pytest.mark.parametrize("size", ["tp_size", "fsdp_size"])
def test_pruning_on_load_takes_the_whole_model(size, found):
    assert found[f"prune {size}"].startswith(f"ModelError: {size}=2 would split the model that is to be pruned")
    assert "torchrun" in found[f"prune {size}"]


@slow
@needs_sizes
def test_a_model_that_is_split_already_is_not_pruned(found):
    assert found["pruner"].startswith("ModelError: model.layers.0.self_attn.q_proj: its weight is split over processes")


@pytest.mark.parametrize("pre_quantized", [True, False])
def test_a_model_that_an_older_transformers_has_split_is_refused(pre_quantized):
    model = tiny.make_model("llama")
    model._tp_size = 2
    quantizer = EGGSHfQuantizer(EGGSConfig("2:4"), pre_quantized=pre_quantized)
    with pytest.raises(ModelError, match="tp_size=2 would split"):
        quantizer.postprocess_model(model)


@pytest.mark.parametrize("pre_quantized", [True, False])
def test_a_plan_of_one_process_splits_nothing(pre_quantized, packed_folder, dense_folder):
    config = EGGSConfig("2:4", calibration=tiny.make_windows(8, 16), num_samples=8, seq_len=16, band=8)
    options = {} if pre_quantized else {"quantization_config": config}
    folder = packed_folder if pre_quantized else dense_folder
    plan = DistributedConfig(tp_size=1, fsdp_size=1)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, **options)
    assert model.hf_quantizer.is_serializable()
