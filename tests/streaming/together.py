"""Run by `torchrun`: prunes one checkpoint in several ways, all processes together. Usage: together.py FOLDER JOBS."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optimum_eggs import EGGSConfig
from optimum_eggs.engine import layer as engine
from optimum_eggs.engine import solve
from optimum_eggs.errors import EGGSError, NumericalError
from optimum_eggs.ranks import join_ranks
from optimum_eggs.streaming import prune_checkpoint


def fail(message: str, *arguments: Any) -> None:
    """In place of solving a layer."""
    raise NumericalError(message)


def failing_once(message: str) -> Callable[..., Any]:
    """In place of what solves with one damping: the first time it fails."""
    plain, failed = solve._solve, []

    def _solve(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise NumericalError(message)
        return plain(*arguments)

    return _solve


def main() -> None:
    """Do the jobs; what a job raises is written to a file of this process."""
    torch.set_num_threads(1)
    ranks = join_ranks()
    root, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, job in jobs.items():
        alone = job.get("of_second", {}) if ranks.rank == 1 else {}  # what only the second process has
        text = root / alone.get("text", "text.txt")
        config = EGGSConfig("2:4", calibration=str(text), **job["config"])
        options = job.get("options", {})
        solve_layer, plain = engine.solve_layer, solve._solve
        if "error" in alone:
            engine.solve_layer = partial(fail, alone["error"])
        if "error_once" in alone:
            solve._solve = failing_once(alone["error_once"])
        try:
            prune_checkpoint(root / job["model"], root / name, config, progress=False, ranks=ranks, **options)
        except EGGSError as error:
            (root / f"{name}-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
        engine.solve_layer, solve._solve = solve_layer, plain


if __name__ == "__main__":
    main()
