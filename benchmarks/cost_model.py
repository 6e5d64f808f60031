"""What pruning with the preset `fast` costs: seconds, bytes sent and memory, by size of the model and processes.

    OMP_NUM_THREADS=1 python benchmarks/cost_model.py --check MODEL --calibration TEXT --processes 1 2
    python benchmarks/cost_model.py --shapes 8B 70B 405B --processes 1 8

The model counts operations and divides by rates: `--gflops` of matrix products in float32 and in the model's dtype,
which are measured here first if they are not given. With `--check` MODEL is pruned, and what was counted is printed
beside what it took. For a block whose stages (layers that read the same tensor) have d inputs:

- forward: every stage needs a pass through what comes before it, and the block one more, on T/R tokens; but attention,
  once its layers are pruned, runs in one of them alone; and all that again in the dense model;
- statistics: d² operations for each of T/R tokens and each stage, and 256 d more: half of a symmetric product; and 2 d²
  for the products with the dense model's inputs;
- update: 17 products of a layer (out, d) with (d, d), of the corrected target, SparseGPT, 10 steps of the refit, its
  start and the error, and once for each stage 4 d³ for the factor in float64; the processes share both;
- sent: 8 d² bytes for each stage, twice over if R > 1, 8 d² for the factor and its inverse, and the block's pruned
  weights;
- memory, when the widest layer is pruned, which comes last: the block, that layer's nine float32 copies and five (d, d)
  ones in float32, and three times the hidden states.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_eggs.calibration.statistics import STRIP
from optimum_eggs.engine.estimate import FACTORISATION
from optimum_eggs.measure import processor

UPDATE_PRODUCTS = 17


@dataclass(frozen=True)
class Shape:
    """A Llama: blocks, hidden size, intermediate size, size of all key heads, bytes of a weight."""

    blocks: int
    hidden: int
    intermediate: int
    keys: int
    itemsize: int = 2

    @property
    def stages(self) -> list[tuple[int, list[int]]]:
        """Inputs of each stage, and the outputs of its layers, in the order they run."""
        h, i = self.hidden, self.intermediate
        return [(h, [h, self.keys, self.keys]), (h, [h]), (h, [i, i]), (i, [h])]

    @property
    def weights(self) -> int:
        """Of a block."""
        return sum(self._weights())

    def before_statistics(self, seq_len: int) -> int:
        """Operations a token of what the block does before each stage; attention, once pruned, is kept."""
        keys, output, up, _ = self._weights()
        return 2 * (keys + (keys + output) + up) + 2 * 4 * seq_len * self.hidden

    @property
    def behind_attention(self) -> int:
        """Operations a token of what the block does behind it."""
        return 2 * sum(self._weights()[2:])

    def _weights(self) -> list[int]:
        return [inputs * sum(outputs) for inputs, outputs in self.stages]


SHAPES = {
    "8B": Shape(32, 4096, 14336, 1024),
    "70B": Shape(80, 8192, 28672, 1024),
    "405B": Shape(126, 16384, 53248, 1024),
}


@dataclass(frozen=True)
class Rates:
    """Operations a second in float32 and in the model's dtype."""

    float32: float
    dtype: float


@dataclass(frozen=True)
class Cost:
    """Seconds by stage; bytes sent and held by a process."""

    seconds: dict[str, float]
    sent: float
    held: float


def cost(shape: Shape, tokens: int, seq_len: int, processes: int, rates: Rates) -> Cost:
    """Of a model, for one of several processes."""
    share = tokens / processes
    statistics, update, sent = 0.0, 0.0, 0.0
    for inputs, outputs in shape.stages:
        statistics += inputs * (inputs + STRIP) + 2 * inputs**2
        rows = sum(outputs) / processes
        factor = FACTORISATION["sparsegpt"] * inputs / processes
        update += (UPDATE_PRODUCTS * 2 * rows + factor) * inputs**2
        sent += 4 * inputs**2 * 6 + shape.itemsize * sum(outputs) * inputs
    largest = max(inputs * max(outputs) for inputs, outputs in shape.stages)
    widest = max(inputs for inputs, _ in shape.stages)
    seconds = {
        "forward": 2 * share * (shape.before_statistics(seq_len) + shape.behind_attention) / rates.dtype,
        "statistics": share * statistics / rates.float32,
        "update": update / rates.float32,
    }
    states = 3 * share * shape.hidden * shape.itemsize
    held = shape.itemsize * shape.weights + 36 * largest + 20 * widest**2 + states
    return Cost(
        {stage: value * shape.blocks for stage, value in seconds.items()},
        sent * shape.blocks * (processes > 1),
        held,
    )


def measured_rates(dtype: torch.dtype) -> Rates:
    """Of this machine, with as many threads as torch has."""

    def operations(kind: torch.dtype) -> float:
        x, y = torch.randn(1024, 2048, dtype=kind), torch.randn(2048, 2048, dtype=kind)
        return 2 * x.numel() * 2048 / least(lambda: x @ y)

    return Rates(operations(torch.float32), operations(dtype))


def least(work: Callable[[], object]) -> float:
    """Least seconds of several runs."""
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def check(args: argparse.Namespace) -> None:
    """Prune a model, and print what was counted beside what it took."""
    config = json.loads((Path(args.check) / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    shape = Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_key_value_heads"] * head,
        dtype.itemsize,
    )
    rates = given_or_measured(args, dtype)
    print("| processes | stage | counted, s | took, s |")
    print("|---:|---|---:|---:|")
    for count in args.processes or [1]:
        counted = cost(shape, args.num_samples * args.seq_len, args.seq_len, count, rates)
        took = pruned(args, count)
        for stage, seconds in counted.seconds.items():
            print(f"| {count} | {stage} | {seconds:.1f} | {took['stages'][stage]['seconds']:.1f} |")
        print(f"| {count} | all | {sum(counted.seconds.values()):.1f} | {took['seconds']:.1f} |", flush=True)


def random_llama(folder: str, args: argparse.Namespace) -> None:
    """Write a model of two blocks of random weights, with the tokenizer of another."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.wide)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pruned(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Prune the model by so many processes. Returns what its report has measured, by the first of them."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [
            sys.executable,
            *(launch if processes > 1 else []),
            "-m",
            "optimum_eggs",
            "prune",
            args.check,
            output,
        ]
        command += ["--calibration", args.calibration, "--preset", "fast"]
        command += ["--num-samples", args.num_samples, "--seq-len", args.seq_len]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        return json.loads((output / "report.json").read_text())["measurements"]


def given_or_measured(args: argparse.Namespace, dtype: torch.dtype) -> Rates:
    """The rates to divide by."""
    if args.gflops:
        return Rates(args.gflops[0] * 1e9, args.gflops[-1] * 1e9)
    rates = measured_rates(dtype)
    name = str(dtype).removeprefix("torch.")
    print(
        f"{processor()}, {torch.get_num_threads()} threads: {rates.float32 / 1e9:.0f} GFLOP/s in float32, "
        f"{rates.dtype / 1e9:.0f} in {name}"
    )
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="MODEL", help="folder of a Llama to prune")
    parser.add_argument("--wide", metavar="MODEL", help="check on random wide layers; MODEL has a tokenizer")
    parser.add_argument("--hidden", type=int, default=2048, help="with --wide")
    parser.add_argument("--intermediate", type=int, default=8192, help="with --wide")
    parser.add_argument("--calibration", help="text file to calibrate on, with --check or --wide")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1 and 8, and 1 with --check")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--gflops", nargs=2, type=float, metavar=("FLOAT32", "DTYPE"), help="rates of products")
    args = parser.parse_args()
    if args.wide:
        with tempfile.TemporaryDirectory() as folder:
            random_llama(folder, args)
            args.check = folder
            check(args)
        return
    if args.check:
        check(args)
        return
    rates = given_or_measured(args, torch.bfloat16)
    print(f"{args.num_samples} x {args.seq_len} tokens; GiB sent and held by a process")
    print("| model | processes | forward, h | statistics, h | update, h | all, h | sent, GiB | memory, GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in args.shapes:
        for count in args.processes or [1, 8]:
            found = cost(SHAPES[name], args.num_samples * args.seq_len, args.seq_len, count, rates)
            hours = [*found.seconds.values(), sum(found.seconds.values())]
            cells = [f"{value / 3600:.1f}" for value in hours] + [f"{x / 2**30:.1f}" for x in (found.sent, found.held)]
            print(f"| {name} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
