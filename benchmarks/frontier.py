"""Quality against time: a model pruned with a preset, and then trained for some steps, from the dense model on.

Each row is a preset and a number of steps of `recover --method values` with the dense model as teacher; 0 is the pruned
model as it is. Seconds are those of pruning, from disk to disk, and of training, loading and the teacher's pass
included; judging is not counted. What is trained on is the text that was calibrated on, all of it or, with
`--same-windows`, the very windows that were, of which none is held out to stop by. With `--development` in place of
`--text`, the calibration text's first three quarters calibrate and train, and its last quarter judges; `--other-text`
judges on a text of another kind too. KL is that of the dense model to the one at hand, nats a token.

Every run is a process of its own. Pruned models stay in `--from-disk`, and a preset is pruned once. Rows are added to
the JSON as they come, and a row that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quality import add_texts, configuration, digest, identity, kept_or_run, output_of, pruned_on_disk, text_of


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Prune unless that is done, train, judge, and return the row."""
    import torch
    from transformers import AutoTokenizer

    from optimum_eggs.hf.loading import load_model

    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    row["seconds_of_pruning"] = row["seconds"] = pruned_on_disk(args)["seconds"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory(dir=args.from_disk) as work:
        packed = output_of(args)
        if args.steps:
            packed, seconds = trained(packed, Path(work), tokenizer, args)
            row["seconds"] += seconds
        models = [load_model(folder, dtype="float32") for folder in (packed, args.model)]
        row |= judged(models, text_of(args)[1], tokenizer, args)
    if args.other_text:
        text = args.other_text.read_text(encoding="utf-8")
        row |= {f"other_{key}": value for key, value in judged(models, [text], tokenizer, args).items()}
    return row


def judged(models: list[Any], text: list[str], tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity of a model and of the dense one, and how far the model is from it."""
    from optimum_eggs.evaluation.paired import compare
    from optimum_eggs.evaluation.reading import read
    from optimum_eggs.evaluation.windows import evaluation_windows

    found = read(models, evaluation_windows(text, tokenizer, args.test_seq_len, args.test_windows), progress=False)
    ours, dense = (found.nats.sum(1) / found.tokens.sum()).exp().tolist()
    return {"perplexity": ours, "perplexity_of_dense": dense, "kl": compare(found).kl_divergence.value}


def trained(packed: Path, work: Path, tokenizer: Any, args: argparse.Namespace) -> tuple[Path, float]:
    """Train the packed model into a folder in `work`; the folder, and the seconds that it took."""
    from optimum_eggs.recovery.recover import RecoverySettings, recover

    rows = work / "train.jsonl"
    rows.write_text(json.dumps({"input_ids": training_ids(tokenizer, args)}) + "\n")
    settings = RecoverySettings(
        [str(rows)],
        teacher=str(args.model),
        method="values",
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        learning_rate=args.learning_rate,
        kd_ratio=args.kd_ratio,
        seed=args.draw,
        held_out=0 if args.same_windows else RecoverySettings.held_out,
    )
    began = time.perf_counter()
    recover(packed, work / "out", settings)
    return work / "out", time.perf_counter() - began


def training_ids(tokenizer: Any, args: argparse.Namespace) -> list[int]:
    """The tokens to train on: those of the windows that calibrated, one after the other, or all of that text."""
    from optimum_eggs.calibration.windows import token_windows

    (text,) = text_of(args)[0]
    if not args.same_windows:
        return tokenizer(text)["input_ids"]
    config = configuration(args.worker, args.pattern, args.draw, args)
    how = {key: getattr(config, key) for key in ("num_samples", "seq_len", "sampling", "seed")}
    return token_windows([text], tokenizer, **how).ids.flatten().tolist()


def wanted_row(preset: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """What makes two rows the same."""
    pruned = identity(preset, args.pattern, args.draw, args)
    if args.other_text:
        pruned["other_text"] = args.other_text.name
        pruned["other_text_sha256"] = digest([args.other_text.read_text(encoding="utf-8")])
    names = ("batch_size", "same_windows", "learning_rate", "kd_ratio")
    return pruned | {"steps": steps, "training": {name: getattr(args, name) for name in names} if steps else {}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = ["model", "preset", "steps", "windows a step", "trained on", "rate", "teacher's share", "seconds"]
    columns += ["of them pruning", "perplexity", "of dense", "KL", "on the other text", "of dense", "KL"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---:|---:|---|" + 10 * "---:|"]
    for row in sorted(rows, key=lambda row: row["seconds"]):
        training = row["training"]
        text = "" if not row["steps"] else "the same windows" if training["same_windows"] else "all of the text"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['steps']} | {training.get('batch_size', '')} | {text} "
            f"| {training.get('learning_rate', '')} | {training.get('kd_ratio', '')} "
            f"| {row['seconds']:.0f} | {row['seconds_of_pruning']:.0f} "
            f"| {quality(row)} | {quality(row, 'other_') if 'other_text' in row else ' | | '} |"
        )
    return "\n".join(lines)


def quality(row: dict[str, Any], kind: str = "") -> str:
    """Three cells of a row."""
    perplexity, dense, kl = (row[f"{kind}{key}"] for key in ("perplexity", "perplexity_of_dense", "kl"))
    return f"{perplexity:.2f} | {perplexity / dense:.3f} | {kl:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the dense model")
    add_texts(parser)
    parser.add_argument("--from-disk", type=Path, required=True, metavar="FOLDER", help="where pruned models stay")
    parser.add_argument("--presets", nargs="+", default=["fast", "alps", "best"], metavar="PRESET[:KEY=VALUE,...]")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 60, 240, 960], help="of training; 0 for none")
    parser.add_argument("--same-windows", action="store_true", help="train on what calibrated, and no other text")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a step (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of training (default: 5e-4, as `recover`'s)")
    parser.add_argument("--kd-ratio", type=float, default=1.0, help="share of the teacher in the loss (default: 1)")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--other-text", type=Path, help="text file to judge on as well (default: none)")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--test-seq-len", type=int, default=1024)
    parser.add_argument("--draw", type=int, default=0, help="draw of calibration windows, and seed (default: 0)")
    parser.add_argument("--json", type=Path, required=True, help="file that rows are read from and added to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.blocks = None
    if args.worker:
        (args.steps,) = args.steps
        print(json.dumps(worker(args)))
        return
    args.from_disk.mkdir(parents=True, exist_ok=True)
    known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows: list[dict[str, Any]] = []
    for preset in args.presets:
        for steps in args.steps:
            wanted, what = wanted_row(preset, steps, args), f"{preset}, {steps} steps"
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", preset, "--steps", str(steps)]
            rows.append(kept_or_run(wanted, known, args.json, what, command))
    for where in dict.fromkeys((row["processor"], row["threads"], row["commit"]) for row in rows):
        print(f"{where[0]}, {where[1]} threads, commit {where[2]}")
    print()
    print(table(rows))


if __name__ == "__main__":
    main()
