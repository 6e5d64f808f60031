"""Pruning by one process and by several: what they agree on, and where the seconds go.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py MODEL WORK --calibration TEXT --text OTHER --processes 2

MODEL is a folder of safetensors files. Every run has OMP_NUM_THREADS threads a process. Seconds are those of the first
process: what it does on its own share of the windows and of the layers, and what it waits for the others ("exchange").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from optimum_eggs.cli.main import main as run_command
from optimum_eggs.measure import processor
from optimum_eggs.packing.pack import unpack_mask
from optimum_eggs.pattern import NMPattern

STAGES = ("forward", "statistics", "rotation", "permutation", "mask", "update", "tuning", "exchange", "report", "pack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("work", type=Path, help="folder to work in")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--text", required=True, help="text file to judge by")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-windows", type=int, default=8, help="to judge by")
    parser.add_argument("--test-seq-len", type=int, default=1024, help="tokens in each of them")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    reports, folders, walls = {}, {}, {}
    for count in (1, args.processes):
        folders[count] = args.work / f"by-{count}"
        walls[count] = prune(args, count, folders[count])
        judge(args, folders[count])
        reports[count] = json.loads((folders[count] / "report.json").read_text())

    same, total = agreement(folders[1], folders[args.processes], NMPattern.parse(args.pattern))
    print(f"{processor()}, {args.preset} at {args.pattern}, {args.num_samples} x {args.seq_len} tokens")
    print(f"the same positions in {100 * same / total:.4f} % of {total} groups")
    print("| processes | seconds | perplexity | " + " | ".join(STAGES) + " |")
    print("|---:|---:|---:|" + "---:|" * len(STAGES))
    for count, report in reports.items():
        stages = report["measurements"]["stages"]
        seconds = [f"{stages[stage]['seconds']:.1f}" if stage in stages else "" for stage in STAGES]
        perplexity = report["evaluations"][0]["metrics"]["perplexity"]
        print(f"| {count} | {walls[count]:.0f} | {perplexity:.3f} | {' | '.join(seconds)} |")


def prune(args: argparse.Namespace, processes: int, output: Path) -> float:
    """Prune by the command; its seconds, from the start of the processes to their end."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, "-m", "optimum_eggs", "prune", args.model, str(output), "--overwrite"]
    command += ["--calibration", args.calibration, "--preset", args.preset, "--pattern", args.pattern]
    for option in ("num_samples", "seq_len", "batch_size"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def judge(args: argparse.Namespace, folder: Path) -> None:
    """Put the perplexity into the folder's report."""
    sizes = ["--seq-len", str(args.test_seq_len), "--num-windows", str(args.num_windows), "--dtype", "float32"]
    if run_command(["evaluate", str(folder), "--text", args.text, *sizes]):
        raise SystemExit(1)


def agreement(one: Path, other: Path, pattern: NMPattern) -> tuple[int, int]:
    """How many groups keep the same positions, and how many there are."""
    same = total = 0
    first, second = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (one, other)
    )
    for key in (key for key in first if key.endswith(".weight_meta")):
        columns = first[key.removesuffix("_meta")].shape[1] // pattern.n * pattern.m
        kept = [unpack_mask(meta, columns).unflatten(1, (-1, pattern.m)) for meta in (first[key], second[key])]
        agree = torch.eq(*kept).all(-1)
        same, total = same + int(agree.sum()), total + agree.numel()
    return same, total


if __name__ == "__main__":
    main()
