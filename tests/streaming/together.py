"""Run by `torchrun`: prunes one checkpoint in several ways, all processes together. Usage: together.py FOLDER JOBS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from optimum_eggs import EGGSConfig
from optimum_eggs.errors import EGGSError
from optimum_eggs.ranks import join_ranks
from optimum_eggs.streaming import prune_checkpoint


def main() -> None:
    """Do the jobs; what a job raises is written to a file of this process."""
    torch.set_num_threads(1)
    ranks = join_ranks()
    root, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, job in jobs.items():
        config = EGGSConfig("2:4", calibration=str(root / "text.txt"), **job["config"])
        options = job.get("options", {})
        try:
            prune_checkpoint(root / job["model"], root / name, config, progress=False, ranks=ranks, **options)
        except EGGSError as error:
            (root / f"{name}-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
