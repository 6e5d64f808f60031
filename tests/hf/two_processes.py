"""Run by test_parallel.py under `torchrun`: loads models split over both processes. Usage: PACKED DENSE RESULTS."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from optimum_eggs import EGGSConfig, EGGSPruner


def main() -> None:
    """Write what became of every way, by name: the error, or the logits' sum; by the first process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    packed, dense, results = sys.argv[1:]
    ids = torch.randint(4, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    config = EGGSConfig("2:4", num_samples=8, seq_len=16, band=8, calibration=ids)

    def load(folder, **options):
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    ways = {
        "packed tp_plan": lambda: load(packed, tp_plan="auto"),
        "packed tp_size": lambda: load(packed, distributed_config=DistributedConfig(tp_size=2)),
        "packed fsdp_size": lambda: load(packed, distributed_config=DistributedConfig(fsdp_size=2)),
        "prune tp_size": lambda: load(
            dense, quantization_config=config, distributed_config=DistributedConfig(tp_size=2)
        ),
        "prune fsdp_size": lambda: load(
            dense, quantization_config=config, distributed_config=DistributedConfig(fsdp_size=2)
        ),
        "pruner": lambda: EGGSPruner.from_pretrained(dense, distributed_config=DistributedConfig(tp_size=2)).prune(
            config, calibration=ids
        ),
    }
    found = {}
    for name, way in ways.items():
        try:
            with torch.no_grad():
                found[name] = float(way()(ids).logits.sum())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
