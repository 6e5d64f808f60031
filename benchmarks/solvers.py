"""The solvers side by side on single layers: relative error, floor and seconds, on the same statistics.

Layers are taken from the dense model. Times are medians of `--repeat` runs that take turns, with the range behind them;
`of ALPS` is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import GramAccumulator, InMemoryBlocks, Walk, token_windows
from optimum_eggs.engine.plan import make_plan
from optimum_eggs.engine.prune import evaluation_mode
from optimum_eggs.engine.solve import Solution, solve_layer
from optimum_eggs.measure import Meter
from optimum_eggs.nn import dense_weight
from optimum_eggs.update import Problem, relative_error

SOLVERS = {
    "RIA": {"preset": "ria"},
    "RIA + swaps": {"preset": "ria", "swaps": 8},
    "RIA + floor + refit": {"preset": "fast", "solver": "score"},
    "SparseGPT": {"preset": "sparsegpt"},
    "SparseGPT + floor + refit (fast)": {"preset": "fast"},
    "ALPS": {"preset": "alps"},
    "ADMM + floor (best)": {"preset": "best"},
}


@torch.no_grad()
def collect(args: argparse.Namespace) -> dict[str, tuple[Tensor, GramAccumulator]]:
    """Weight and statistics of the layers asked for, in the dense model."""
    pruner = EGGSPruner.from_pretrained(args.model, dtype="float32")
    windows = token_windows(
        args.calibration,
        pruner.tokenizer,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        sampling="sequential",
        seed=0,
    ).ids
    plan = make_plan(pruner.model, EGGSConfig(args.pattern))
    found = {}
    with Meter() as meter, evaluation_mode(pruner.model):
        blocks = InMemoryBlocks(pruner.model, plan.block_list)
        walk = Walk(blocks, windows.split(4), meter)
        for index in range(max(args.blocks) + 1):
            block = blocks.materialise(index)
            if index in args.blocks:
                for stage in walk.stages(block, index, plan.layers[index]):
                    leader = plan.layers[index][stage[0]]
                    gram = walk.statistics(block, index, leader)
                    found[stage[-1]] = (dense_weight(plan.layers[index][stage[-1]]).clone(), gram)
            walk.advance(block, index)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--blocks", nargs="+", type=int, default=[14], help="the last linear of each stage of these")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    layers = collect(args)
    print("| layer | solver | relative error | least kept per 16 rows | seconds (least-most) | of ALPS |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (weight, gram) in layers.items():
        seconds: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
        solutions: dict[str, Solution] = {}
        for _ in range(args.repeat):
            for solver, values in SOLVERS.items():
                config = EGGSConfig(args.pattern, **values)  # type: ignore[arg-type]
                with Meter() as meter:
                    start = time.perf_counter()
                    solutions[solver] = solve_layer(name, weight, Problem(gram.gram, config.damping), config, meter)
                    seconds[solver].append(time.perf_counter() - start)
        alps = statistics.median(seconds["ALPS"])
        for solver, found in solutions.items():
            height = min(16, len(weight))
            least = int(found.mask[: len(weight) // height * height].unflatten(0, (-1, height)).sum(1).min())
            took = statistics.median(seconds[solver])
            error = relative_error(weight, found.weight, gram.gram)
            span = f"{took:.2f} ({min(seconds[solver]):.2f}-{max(seconds[solver]):.2f})"
            print(f"| {name} | {solver} | {error:.5f} | {least} | {span} | {took / alps:.2f} |", flush=True)


if __name__ == "__main__":
    main()
