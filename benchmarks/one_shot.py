"""The one-shot methods side by side: perplexity, error, degree floor, CPU seconds and memory.

Every run is a process of its own, so that memory is its own. The dense model is judged in the same way. With
`--repeat`, pruning with wanda and fast is timed that often, taking turns; CPU seconds are medians, with the range
behind them. Memory growth is the peak while pruning over what was resident once the model was loaded, as a share of the
dense model's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ["magnitude", "wanda", "ria", "paper", "fast"]


def worker(args: argparse.Namespace, method: str, judge: bool) -> dict[str, Any]:
    """Prune with one method and judge the result; the dense model is only judged."""
    import psutil
    import torch

    from optimum_eggs import EGGSConfig, EGGSPruner
    from optimum_eggs.evaluation import perplexity
    from optimum_eggs.evaluation.compare import evaluation_windows

    pruner = EGGSPruner.from_pretrained(args.model, dtype="float32")
    dense_bytes = sum(p.numel() * p.element_size() for p in pruner.model.parameters())
    loaded_rss = psutil.Process().memory_info().rss
    row: dict[str, Any] = {"method": method, "threads": torch.get_num_threads(), "dense_bytes": dense_bytes}
    if method != "dense":
        config = EGGSConfig(
            args.pattern,
            preset=method,
            calibration=args.calibration,
            num_samples=args.num_samples,
            seq_len=args.seq_len,
            sampling="sequential",
        )
        report = pruner.prune(config, progress=False)
        took = report.measurements
        floors = [layer.certificate.floors[min(16, layer.out_features)] for layer in report.layers]
        row |= {
            "relative_error": report.mean_relative_error,
            "starved_inputs": report.starved_inputs,
            "floor_per_16_rows": min(floors),
            "least_share_of_outputs": min(
                layer.certificate.input_degree_min / layer.out_features for layer in report.layers
            ),
            "seconds": took["seconds"],
            "cpu_seconds": took["cpu_seconds"],
            "cpu_seconds_by_stage": {name: stage["cpu_seconds"] for name, stage in took["stages"].items()},
            "memory_growth": (took["peak_rss"] - loaded_rss) / dense_bytes,
            "calibration_sha256": report.calibration["sha256"],
            "versions": report.versions,
        }
    if judge:
        windows = evaluation_windows(args.text, pruner.tokenizer, args.test_seq_len, args.test_windows)
        row["perplexity"] = perplexity(pruner.model, windows, progress=False).perplexity
    return row


def run_worker(arguments: list[str], method: str, judge: bool) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--worker", method, *(["--judge"] if judge else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout)


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run's row, with the spread of the timed figures over all of them."""
    row = dict(runs[0])
    for key in ("cpu_seconds", "seconds", "memory_growth"):
        if key in row:
            values = [run[key] for run in runs]
            row[key] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    wanda = next((row["cpu_seconds"]["median"] for row in rows if row["method"] == "wanda"), None)
    lines = [
        "| method | perplexity | relative error | starved inputs | least kept per 16 rows | least share of outputs "
        "| CPU s (least-most) | of wanda | memory growth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["method"] == "dense":
            lines.append(f"| dense | {row['perplexity']:.2f} | | | | | | | |")
            continue
        cpu = row["cpu_seconds"]
        ratio = f"{cpu['median'] / wanda:.2f}" if wanda else ""
        lines.append(
            f"| {row['method']} | {row['perplexity']:.2f} | {row['relative_error']:.4f} | {row['starved_inputs']} "
            f"| {row['floor_per_16_rows']} | {row['least_share_of_outputs']:.3f} "
            f"| {cpu['median']:.0f} ({cpu['least']:.0f}-{cpu['most']:.0f}) | {ratio} "
            f"| {row['memory_growth']['most']:.0%} |"
        )
    return "\n".join(lines)


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that the benchmark is run from."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--text", required=True, help="text file to judge on")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--test-seq-len", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=1, help="times that pruning with wanda and fast is timed")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args, args.worker, args.judge)))
        return

    arguments = sys.argv[1:]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in ["dense", *args.methods]}
    for turn in range(args.repeat):
        for method in runs:
            if turn == 0 or method in ("wanda", "fast"):
                print(f"{method}, run {turn + 1}", file=sys.stderr, flush=True)
                runs[method].append(run_worker(arguments, method, judge=turn == 0))
    rows = [combine(of_method) for of_method in runs.values()]
    print(f"{args.pattern}, {rows[0]['threads']} threads, {processor()}, commit {commit()}\n")
    print(table(rows))
    if args.json:
        facts = {"processor": processor(), "commit": commit(), "pattern": args.pattern}
        args.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
