"""Quality of the one-shot methods: methods x patterns x draws of calibration windows, on one model and two texts.

A method is a preset, or a preset with values of its own: `best:block_tuning=0,permutation=true`; `dense` is the model
as it is. Draw 0 takes the first windows of the calibration text, end to end; draw k takes windows at random with seed
k. Every run is a process of its own, so that memory is its own. Rows are added to the JSON as they come, and a row that
is there already (same model, texts, windows and configuration) is not run again, so a run may be cut and resumed; the
commits of the rows are printed above the table.

Perplexity is exp of the mean loss over all predicted tokens of consecutive windows of the test text. With
`--development` in place of `--text`, the calibration text's first three quarters calibrate and its last quarter judges,
so that settings are not chosen by a test text; KL is that of the dense model to the pruned one, nats a token. With
`--blocks`, only those are pruned. Memory growth is
the peak while pruning over what was resident once the model was loaded, as a share of the dense model's bytes.

With `--from-disk FOLDER` the model is pruned from disk to a folder in FOLDER, one block in memory at a time. A run that
was cut goes on behind its last finished block, and its row counts the seconds of all of them. Memory is then the most
that the process held resident, all libraries counted, as a share of the dense model's bytes in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from optimum_eggs.measure import processor

METHODS = ["magnitude", "wanda", "ria", "paper", "sparsegpt", "alps", "fast", "best"]


def configuration(method: str, pattern: str, draw: int, args: argparse.Namespace) -> Any:
    """The configuration that `method` stands for."""
    from optimum_eggs import EGGSConfig

    name, _, extra = method.partition(":")
    values = dict(item.split("=", 1) for item in extra.split(",") if item)
    return EGGSConfig(
        pattern,
        preset=name,
        calibration=text_of(args)[0],
        targets=[f"layers.{index}" for index in args.blocks] if args.blocks else None,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        sampling="random" if draw else "sequential",
        seed=draw,
        **{key: parsed(value) for key, value in values.items()},
    )


def identity(method: str, pattern: str, draw: int, args: argparse.Namespace) -> dict[str, Any]:
    """What makes two rows the same: the model by name, the texts by content, the windows, the whole configuration."""
    row = {key: getattr(args, key) for key in ("test_windows", "test_seq_len")}
    calibration, judge = text_of(args)
    row |= {"model": Path(args.model).name, "text": Path(args.text or args.calibration).name, "method": method}
    row["text_sha256"] = digest(judge)
    row["from_disk"] = args.from_disk is not None and method != "dense"
    if method == "dense":
        return row | {"pattern": "", "draw": 0}
    row["calibration_file_sha256"] = digest(calibration)
    config = configuration(method, pattern, draw, args).to_dict() | {"calibration": Path(args.calibration).name}
    return row | {"pattern": pattern, "draw": draw, "config": config}


def is_row(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a row is of what is wanted.

    An option newer than the row had the value that is now the default, and what makes a method the one that leaves it
    out; of one that is gone since, the method tells. Short windows came with tuning later, and rows of before stand for
    the same method: the commit, which is printed, tells.
    """
    from optimum_eggs import EGGSConfig
    from optimum_eggs.presets import METHOD

    asked, had = wanted.get("config", {}), row.get("config", {})
    had = {key: value for key, value in had.items() if key in asked}
    defaults = EGGSConfig().to_dict() | METHOD
    defaults["short_share"] = asked.get("short_share")
    newer = {key: value for key, value in defaults.items() if key in asked and key not in had}
    return wanted.items() <= ({"from_disk": False} | row | ({"config": newer | had} if had else {})).items()


def text_of(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The text to calibrate on and that to judge by, each as one document."""
    text = Path(args.calibration).read_text(encoding="utf-8")
    if not args.development:
        return [text], [Path(args.text).read_text(encoding="utf-8")]
    quarter = len(text) * 3 // 4
    cut = text.find("\n", quarter) + 1 or quarter
    return [text[:cut]], [text[cut:]]


def digest(texts: list[str]) -> str:
    """SHA-256 of the texts in UTF-8, in hexadecimal."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def parsed(value: str) -> Any:
    """`"70"` to 70, `"true"` to True, `"score"` to itself."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Prune with one method, judge the result, and return the row."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_eggs import EGGSPruner
    from optimum_eggs.evaluation import perplexity
    from optimum_eggs.evaluation.paired import compare
    from optimum_eggs.evaluation.reading import read
    from optimum_eggs.evaluation.windows import evaluation_windows

    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    from_disk = args.from_disk is not None and args.worker != "dense"
    if from_disk:
        row |= pruned_on_disk(args)
    pruner = EGGSPruner.from_pretrained(args.model, dtype="float32")
    row["dense_bytes"] = sum(p.numel() * p.element_size() for p in pruner.model.parameters())
    loaded_rss = psutil.Process().memory_info().rss
    if from_disk:
        row["memory_growth"] = row["peak_rss"] / row["dense_bytes"]
        del pruner.model
        pruner.model = AutoModelForCausalLM.from_pretrained(output_of(args))
    elif args.worker != "dense":
        report = pruner.prune(configuration(args.worker, args.pattern, args.draw, args), progress=False)
        row |= of_report(report)
        row["memory_growth"] = (row["peak_rss"] - loaded_rss) / row["dense_bytes"]
    windows = evaluation_windows(text_of(args)[1], pruner.tokenizer, args.test_seq_len, args.test_windows)
    if args.development and args.worker != "dense":
        dense = EGGSPruner.from_pretrained(args.model, dtype="float32").model
        row["kl"] = compare(read([pruner.model, dense], windows, progress=False)).kl_divergence.value
        del dense
    return row | {"perplexity": perplexity(pruner.model, windows, progress=False).perplexity}


def pruned_on_disk(args: argparse.Namespace) -> dict[str, Any]:
    """Prune from disk to disk, unless that is done, and return what is known of it, which is kept beside the output."""
    from optimum_eggs.streaming import prune_checkpoint

    output = output_of(args)
    kept = output.with_suffix(".json")
    if not kept.exists():
        config = configuration(args.worker, args.pattern, args.draw, args)
        report = prune_checkpoint(args.model, output, config, dtype="float32", overwrite=True, progress=None)
        row, took = of_report(report), report.measurements
        row["seconds"] += took["seconds_of_earlier_runs"]
        row["blocks_of_earlier_runs"] = took["blocks_of_earlier_runs"]
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["peak_rss"] = max(own, took["peak_rss_of_earlier_runs"])
        kept.write_text(json.dumps(row))
    return json.loads(kept.read_text())


def output_of(args: argparse.Namespace) -> Path:
    """Where a run from disk to disk puts its model."""
    made = identity(args.worker, args.pattern, args.draw, args)
    name = re.sub(r"\W+", "-", f"{made['model']}-{args.worker}-{args.pattern}-{args.draw}")
    return args.from_disk / f"{name}-{digest([json.dumps(made, sort_keys=True)])[:12]}"


def of_report(report: Any) -> dict[str, Any]:
    """What a row tells of a pruning."""
    took, layers = report.measurements, report.layers
    kept = [layer.certificate.input_degree_min / layer.out_features for layer in layers]
    return {
        "relative_error": report.mean_relative_error,
        "starved_inputs": report.starved_inputs,
        "floor_per_16_rows": min(layer.certificate.floors[min(16, layer.out_features)] for layer in layers),
        "least_share_of_outputs": min(kept),
        "seconds": took["seconds"],
        "cpu_seconds": took["cpu_seconds"],
        "seconds_by_stage": {name: stage["seconds"] for name, stage in took["stages"].items()},
        "peak_rss": took["peak_rss"],
        "rotation": report.rotation,
        "tuning": [(block.error_before, block.error_after) for block in report.tuning],
        "permutation_gains": [layer.permutation_gain for layer in layers if layer.permutation_gain is not None],
        "calibration_sha256": report.calibration["sha256"],
        "versions": report.versions,
    }


def run_worker(arguments: list[str], method: str, pattern: str, draw: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--worker", method, "--pattern", pattern, "--draw", str(draw)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, one line for each method and pattern, mean ± standard deviation over draws."""
    memory = "peak memory" if any(row.get("from_disk") for row in rows) else "memory growth"
    lines = [
        "| pattern | method | draws | perplexity | relative error | starved inputs | least kept per 16 rows "
        f"| least share of outputs | seconds | {memory} | KL | blocks improved |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for pattern, method in dict.fromkeys((row["pattern"], row["method"]) for row in rows):
        runs = [row for row in rows if (row["pattern"], row["method"]) == (pattern, method)]
        shown = f"| {pattern} | {method} | {len(runs)} | {spread(runs, 'perplexity', '.2f')} |"
        if method == "dense":
            lines.append(shown + " | | | | | | | |")
            continue
        shares = min(row["least_share_of_outputs"] for row in runs)
        lines.append(
            f"{shown} {statistics.mean(row['relative_error'] for row in runs):.4f} "
            f"| {max(row['starved_inputs'] for row in runs)} | {min(row['floor_per_16_rows'] for row in runs)} "
            f"| {shares:.3f} | {spread(runs, 'seconds', '.0f')} | {max(row['memory_growth'] for row in runs):.0%} "
            f"| {spread(runs, 'kl', '.4f') if all('kl' in row for row in runs) else ''} "
            f"| {' '.join(improved(row) for row in runs if row['tuning'])} |"
        )
    return "\n".join(lines)


def improved(row: dict[str, Any]) -> str:
    """How many of the blocks tuned came out better."""
    return f"{sum(after < before for before, after in row['tuning'])} of {len(row['tuning'])}"


def spread(runs: list[dict[str, Any]], key: str, style: str) -> str:
    """Mean, and standard deviation if there is more than one run."""
    values = [run[key] for run in runs]
    deviation = f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{style}}{deviation}"


def commit() -> str:
    """The commit that the benchmark is run from."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The options that `text_of` reads."""
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--text", help="text file to judge on")
    judge.add_argument("--development", action="store_true", help="judge on the last quarter of the calibration text")


def kept_or_run(
    wanted: dict[str, Any], known: list[dict[str, Any]], file: Path | None, what: str, command: list[str]
) -> dict[str, Any]:
    """The known row that is `wanted`; else the one that `command` prints, which is then known, and in the file.

    `what` is said on stderr before the command runs.
    """
    row = next((row for row in known if wanted.items() <= row.items()), None)
    if row is None:
        print(what, file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = wanted | {"processor": processor(), "commit": commit()} | json.loads(done.stdout.splitlines()[-1])
        known.append(row)
        if file:
            file.write_text(json.dumps({"rows": known}, indent=1) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the dense model")
    add_texts(parser)
    parser.add_argument("--blocks", nargs="+", type=int, help="prune these alone")
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], metavar="PRESET[:KEY=VALUE,...]")
    parser.add_argument("--draws", nargs="+", type=int, default=[0], help="draws of calibration windows")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--test-seq-len", type=int, default=1024)
    parser.add_argument("--from-disk", type=Path, metavar="FOLDER", help="prune from disk to folders in this one")
    parser.add_argument("--json", type=Path, help="file that rows are read from and added to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--pattern", help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return

    known = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    rows: list[dict[str, Any]] = []
    for pattern in args.patterns:
        for method in args.methods:
            for draw in args.draws if method != "dense" else [0]:
                wanted = identity(method, pattern, draw, args)
                row = next((row for row in known if is_row(row, wanted)), None)
                if row is None:
                    print(f"{pattern} {method}, draw {draw}", file=sys.stderr, flush=True)
                    made = {"processor": processor(), "commit": commit()}
                    row = wanted | made | run_worker(sys.argv[1:], method, pattern, draw)
                    known.append(row)
                    if args.json:
                        args.json.write_text(json.dumps({"rows": known}, indent=1) + "\n")
                if row not in rows:
                    rows.append(row)
    for processor_name, threads, of_commit in dict.fromkeys((r["processor"], r["threads"], r["commit"]) for r in rows):
        methods = dict.fromkeys(row["method"] for row in rows if row["commit"] == of_commit)
        print(f"{processor_name}, {threads} threads, commit {of_commit}: {', '.join(methods)}")
    print()
    print(table(rows))


if __name__ == "__main__":
    main()
