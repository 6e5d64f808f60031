"""What integers for the values cost and save: one packed model with floats, and what `quantize` makes of it.

A variant is what is asked for, `int4`, `int4:value_group=64` or `int4:rounding=nearest,rounding_tuning=0`; `floats` is
the packed model as it is. Every run is a process of its own. Perplexity is exp of the mean loss over all predicted
tokens of consecutive windows of the test text, in float32; the ratio is to that of `floats`. Bytes are those of the
pruned layers, as a share of dense bfloat16, and those of all weight files. Rows are added to the JSON as they come, and
a row that is there already is not run again.

A token alone meets kernels that round its inputs to bytes. What that costs is the perplexity of the first `--single`
tokens of the first window, given one after the other, over that with exact inputs.

With `--development` in place of `--text`, the calibration text's first three quarters calibrate and its last quarter
judges; the packed model must have been pruned so as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from quality import add_texts, digest, kept_or_run, parsed, text_of

VARIANTS = ["floats", "int8", "int8:rounding=gptq", "int4:rounding=nearest,rounding_tuning=0", "int4:rounding_tuning=0"]
VARIANTS += ["int4", "int4:value_group=64"]


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Make a variant, judge it, and return the row."""
    import torch
    from transformers import AutoTokenizer

    from optimum_eggs.evaluation import perplexity
    from optimum_eggs.evaluation.windows import evaluation_windows
    from optimum_eggs.hf.loading import load_model
    from optimum_eggs.inspection import inspect_checkpoint
    from optimum_eggs.ops import force
    from optimum_eggs.quantize import quantize

    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    calibration, judge = text_of(args)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(args.model)
        if args.worker != "floats":
            kind, _, extra = args.worker.partition(":")
            settings = {key: parsed(value) for key, value in (item.split("=") for item in extra.split(",") if item)}
            settings |= {"values": None if kind == "head" else kind, "head": args.head, "calibration": calibration}
            settings |= {"num_samples": args.num_samples, "seq_len": args.seq_len, "sampling": "sequential", "seed": 0}
            began, folder = time.perf_counter(), Path(work) / "out"
            done = quantize(args.model, folder, settings)
            row |= {"seconds": time.perf_counter() - began, "tuning": done["tuning"]}
        layers = inspect_checkpoint(folder, progress=False).layers
        dense = 2 * sum(layer.out_features * layer.in_features for layer in layers)
        row["share_of_bfloat16"] = sum(layer.packed_bytes for layer in layers) / dense
        row["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        model = load_model(folder, dtype="float32")
        windows = evaluation_windows(
            judge, AutoTokenizer.from_pretrained(args.model), args.test_seq_len, args.test_windows
        )
        row["perplexity"] = perplexity(model, windows, progress=False).perplexity
        if args.single:
            loss = one_by_one(model, windows[0, : args.single])
            with force("reference"):
                row["rounded_inputs"] = exp(loss - one_by_one(model, windows[0, : args.single]))
        return row


def one_by_one(model: Any, ids: Any) -> float:
    """Mean loss of the tokens `ids`, each given alone behind a cache of those before it."""
    import torch

    losses, cache = [], None
    with torch.no_grad():
        for token, following in pairwise(ids.tolist()):
            given = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            losses.append(-float(given.logits[0, -1].log_softmax(-1)[following]))
    return fmean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a packed model with floats")
    parser.add_argument("--name", help="what the rows call it (default: the folder's name)")
    add_texts(parser)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="KIND[:KEY=VALUE,...]")
    parser.add_argument("--head", choices=["int8"], help="integers for embeddings and head too")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--test-seq-len", type=int, default=1024)
    parser.add_argument("--single", type=int, default=512, help="tokens given one by one (default: 512; 0 for none)")
    parser.add_argument("--work", type=Path, help="folder for the models that are made (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file that rows are read from and added to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    known = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    calibration, judged = text_of(args)
    keys = ("head", "single", "num_samples", "seq_len", "test_windows", "test_seq_len")
    shared = {key: getattr(args, key) for key in keys} | {"model": args.name or Path(args.model).name}
    shared |= {"calibration_sha256": digest(calibration), "text_sha256": digest(judged)}
    rows = []
    for variant in args.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
        rows.append(kept_or_run(shared | {"variant": variant}, known, args.json, variant, command))
    for where in dict.fromkeys((row["processor"], row["threads"], row["commit"]) for row in rows):
        print(f"{where[0]}, {where[1]} threads, commit {where[2]}")
    print()
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    base = next((row["perplexity"] for row in rows if row["variant"] == "floats"), None)
    lines = [
        "| model | values | head | pruned layers, of bfloat16 | files, MB | perplexity | ratio | by rounded inputs "
        "| seconds |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        ratio = "" if base is None else f"{row['perplexity'] / base:.4f}"
        head = row["head"] if row["variant"] != "floats" and row["head"] else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        inputs = f"{row['rounded_inputs']:.4f}" if "rounded_inputs" in row else ""
        lines.append(
            f"| {row['model']} | {row['variant']} | {head} | {row['share_of_bfloat16']:.3f} "
            f"| {row['file_bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {ratio} | {inputs} | {seconds} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
