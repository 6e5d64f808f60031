"""Measure a saved model: perplexity, size on disk, parameters kept; beside another model, if one is named."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    from ..hf.loading import DTYPES

    parser.add_argument("model", metavar="DIR", help="folder of a model, packed or dense")
    parser.add_argument("--text", required=True, metavar="FILE|NAME", help="text to predict: a file or a data set")
    parser.add_argument("--split", default="test", help="split of a data set from the Hub (default: test)")
    parser.add_argument("--text-column", help="text column of a data set from the Hub (default: text)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a window (default: 1024)")
    parser.add_argument("--num-windows", type=int, help="use only the first windows (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows run at a time (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to run in (default: the checkpoint's)")
    parser.add_argument("--against", metavar="DENSE", help="folder of another model, measured on the same windows")


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    from ..evaluation.compare import evaluate_folder

    first = evaluate_folder(args.model, args)
    results: dict[str, Any] = {"model": asdict(first)}
    if args.against:
        second = evaluate_folder(args.against, args, first.pruned_layers, first.token_digest)
        results["against"] = asdict(second)
        results["ratio"] = {
            "perplexity": first.perplexity.perplexity / second.perplexity.perplexity,
            "weight_bytes": first.size.weight_bytes / second.size.weight_bytes,
        }
        if second.size.pruned_layer_bytes:
            results["ratio"]["pruned_layer_bytes"] = first.size.pruned_layer_bytes / second.size.pruned_layer_bytes
    if args.json:
        print(json.dumps(results))
        return 0
    columns = [first] + ([second] if args.against else [])
    rows = [
        ("", [column.folder for column in columns]),
        ("perplexity", [f"{column.perplexity.perplexity:.2f}" for column in columns]),
        ("tokens predicted", [f"{column.perplexity.tokens:,}" for column in columns]),
        ("weights on disk", [_megabytes(column.size.weight_bytes) for column in columns]),
        ("of them pruned layers", [_megabytes(column.size.pruned_layer_bytes) for column in columns]),
        ("parameters kept", [_kept(column.size) for column in columns]),
    ]
    width = max(24, *(len(column.folder) + 2 for column in columns))
    for label, cells in rows:
        print(f"{label:<24}" + "".join(f"{cell:>{width}}" for cell in cells))
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _kept(size: Any) -> str:
    return f"{size.parameters_kept / 1e6:,.1f} M of {size.parameters / 1e6:,.1f} M"
