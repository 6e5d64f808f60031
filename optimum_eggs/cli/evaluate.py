"""Measure a saved model: perplexity, size on disk, parameters kept; compared with another model, if one is named."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    from ..hf.loading import DTYPES

    parser.add_argument("model", metavar="DIR", help="folder of a model, packed or dense")
    parser.add_argument("--text", required=True, metavar="FILE|NAME", help="text to predict: a file or a data set")
    parser.add_argument("--split", default="test", help="split of a data set from the Hub (default: test)")
    parser.add_argument("--text-column", help="text column of a data set from the Hub (default: text)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a window (default: 1024)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from one window to the next; those that overlap are read, not predicted (default: --seq-len)",
    )
    parser.add_argument("--num-windows", type=int, help="use only the first windows (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows run at a time (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to run in (default: the checkpoint's)")
    parser.add_argument("--no-record", action="store_true", help="leave the report of DIR as it is")
    parser.add_argument("--against", metavar="DENSE", help="folder of another model, compared on the same windows")


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    from ..engine.report import REPORT_NAME
    from ..evaluation.compare import evaluate

    columns, comparison = evaluate([args.model, *([args.against] if args.against else [])], args)
    first = columns[0]
    results: dict[str, Any] = {"model": asdict(first)}
    if comparison is not None:
        second = columns[1]
        results["against"] = asdict(second)
        results["comparison"] = asdict(comparison)
        results["ratio"] = {
            "perplexity": first.perplexity.perplexity / second.perplexity.perplexity,
            "weight_bytes": first.size.weight_bytes / second.size.weight_bytes,
        }
        if second.size.pruned_layer_bytes:
            results["ratio"]["pruned_layer_bytes"] = first.size.pruned_layer_bytes / second.size.pruned_layer_bytes
    recorded = not args.no_record and _record(args, results)
    if args.json:
        print(json.dumps(results))
        return 0
    rows = [
        ("", [column.folder for column in columns]),
        ("perplexity", [f"{column.perplexity.perplexity:.2f}" for column in columns]),
        ("nats a token", [f"{column.perplexity.nats_per_token:.4f}" for column in columns]),
        ("bits a byte", [_or_nothing(column.perplexity.bits_per_byte) for column in columns]),
        ("tokens predicted", [f"{column.perplexity.tokens:,}" for column in columns]),
        ("weights on disk", [_megabytes(column.size.weight_bytes) for column in columns]),
        ("of them pruned layers", [_megabytes(column.size.pruned_layer_bytes) for column in columns]),
        ("parameters kept", [_kept(column.size) for column in columns]),
    ]
    width = max(24, *(len(column.folder) + 2 for column in columns))
    for label, cells in rows:
        print(f"{label:<24}" + "".join(f"{cell:>{width}}" for cell in cells))
    if comparison is not None:
        print("\nthe first against the second, with 95 % intervals over the windows")
        for label, found in (
            ("perplexity, times", comparison.perplexity_ratio),
            ("nats a token, more", comparison.nats_difference),
            ("KL divergence, nats", comparison.kl_divergence),
            ("same most likely token", comparison.top1_agreement),
        ):
            span = "" if found.low is None else f"({found.low:.4f} to {found.high:.4f})"
            print(f"{label:<24}{found.value:>10.4f}  {span}")
    if recorded:
        print(f"recorded in {Path(args.model) / REPORT_NAME}, for the model card")
    return 0


def _record(args: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Put the perplexity into the report of the model, in place of an earlier one under the same conditions."""
    from ..engine.report import read_report, update_report

    found = results["model"]["perplexity"]
    is_file = Path(args.text).is_file()
    entry: dict[str, Any] = {
        "dataset": Path(args.text).name if is_file else args.text,
        "split": None if is_file else args.split,
        "conditions": f"{found['windows']} windows of {found['seq_len']} tokens"
        + ("" if args.stride in (None, args.seq_len) else f" with stride {args.stride}")
        + f", {results['model']['dtype']}",
        "tokens_sha256": results["model"]["token_digest"],
        "metrics": {"perplexity": found["perplexity"]},
    }
    if found["bits_per_byte"] is not None:
        entry["metrics"]["bits_per_byte"] = found["bits_per_byte"]
    if "against" in results and not results["against"]["pruned_layers"]:  # the report says nothing of other models
        entry["dense"] = {key: results["against"]["perplexity"][key] for key in entry["metrics"]}
        entry["comparison"] = results["comparison"]
    same = ("dataset", "split", "conditions")
    before = read_report(args.model).get("evaluations", [])
    kept = [other for other in before if any(other[key] != entry[key] for key in same)]
    return update_report(args.model, evaluations=[*kept, entry])


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _kept(size: Any) -> str:
    return f"{size.parameters_kept / 1e6:,.1f} M of {size.parameters / 1e6:,.1f} M"
