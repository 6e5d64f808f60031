"""Measure a saved model: perplexity, tasks, size on disk, parameters kept; against another model, if one is named."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation import Comparison, Estimate
    from ..evaluation.compare import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    from ..dtypes import DTYPES

    parser.add_argument("model", metavar="DIR", help="folder of a model, packed or dense")
    parser.add_argument("--text", metavar="FILE|NAME", help="text to predict: a file or a data set")
    parser.add_argument("--split", default="test", help="split of a data set from the Hub (default: test)")
    parser.add_argument("--text-column", help="text column of a data set from the Hub (default: text)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a window (default: 1024)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from one window to the next; those that overlap are read, not predicted (default: --seq-len)",
    )
    parser.add_argument("--num-windows", type=int, help="use only the first windows (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows or requests run at a time (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to run in (default: the checkpoint's)")
    parser.add_argument("--no-record", action="store_true", help="leave the report of DIR as it is")
    parser.add_argument("--against", metavar="DENSE", help="folder of another model, compared on the same data")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'optimum-eggs[eval]')")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks, groups or tags to run")
    tasks.add_argument("--include-path", metavar="DIR", help="folder with YAML files of further tasks")
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question (default: as the task says)")
    tasks.add_argument("--limit", type=int, help="only the first documents of each task, to try things out")
    tasks.add_argument("--apply-chat-template", action="store_true", help="ask as the tokenizer's chat template says")


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    from ..engine.report import REPORT_NAME
    from ..evaluation import task_differences
    from ..evaluation.compare import evaluate

    columns, comparison = evaluate([args.model, *([args.against] if args.against else [])], args)
    differences = {
        ours.task: task_differences(ours, theirs)
        for ours, theirs in (zip(columns[0].tasks, columns[1].tasks, strict=True) if args.against else ())
    }
    recorded = not args.no_record and _record(args, columns, comparison, differences)
    if args.json:
        print(json.dumps(_results(columns, comparison, differences)))
        return 0
    _print_columns(columns)
    if comparison is not None:
        _print_comparison(comparison)
    if columns[0].tasks:
        _print_tasks(columns, differences)
    if recorded:
        print(f"recorded in {Path(args.model) / REPORT_NAME}, for the model card")
    return 0


def _results(
    columns: list[Evaluation], comparison: Comparison | None, differences: dict[str, dict[str, Estimate]]
) -> dict[str, Any]:
    first, *others = columns
    results: dict[str, Any] = {"model": first.to_dict()}
    for second in others:
        results["against"] = second.to_dict()
        results["ratio"] = {"weight_bytes": first.size.weight_bytes / second.size.weight_bytes}
        if second.size.pruned_layer_bytes:
            results["ratio"]["pruned_layer_bytes"] = first.size.pruned_layer_bytes / second.size.pruned_layer_bytes
        if first.perplexity is not None and second.perplexity is not None:
            results["ratio"]["perplexity"] = first.perplexity.perplexity / second.perplexity.perplexity
    if comparison is not None:
        results["comparison"] = asdict(comparison)
    if differences:
        results["task_differences"] = _plain(differences)
    return results


def _print_columns(columns: list[Evaluation]) -> None:
    rows = [("", [column.folder for column in columns])]
    judged = [column.perplexity for column in columns if column.perplexity is not None]
    if judged:
        rows += [
            ("perplexity", [f"{found.perplexity:.2f}" for found in judged]),
            ("nats a token", [f"{found.nats_per_token:.4f}" for found in judged]),
            ("bits a byte", [_or_nothing(found.bits_per_byte) for found in judged]),
            ("tokens predicted", [f"{found.tokens:,}" for found in judged]),
        ]
    rows += [
        ("weights on disk", [_megabytes(column.size.weight_bytes) for column in columns]),
        ("of them pruned layers", [_megabytes(column.size.pruned_layer_bytes) for column in columns]),
        ("parameters kept", [_kept(column.size) for column in columns]),
    ]
    width = max(24, *(len(column.folder) + 2 for column in columns))
    for label, cells in rows:
        print(f"{label:<24}" + "".join(f"{cell:>{width}}" for cell in cells))


def _print_comparison(comparison: Comparison) -> None:
    print("\nthe first against the second, with 95 % intervals over the windows")
    for label, found in (
        ("perplexity, times", comparison.perplexity_ratio),
        ("nats a token, more", comparison.nats_difference),
        ("KL divergence, nats", comparison.kl_divergence),
        ("same most likely token", comparison.top1_agreement),
    ):
        print(f"{label:<24}{found.value:>10.4f}  {_span(found)}")


def _print_tasks(columns: list[Evaluation], differences: dict[str, dict[str, Estimate]]) -> None:
    print("\ntasks, ± the standard error" + ("; the difference with its 95 % interval" if differences else ""))
    for index, task in enumerate(columns[0].tasks):
        shots = "" if task.num_fewshot is None else f", {task.num_fewshot} examples each"
        print(f"{task.task} ({task.documents:,} documents{shots})")
        for metric in task.metrics:
            cells = []
            for column in columns:
                score = column.tasks[index].metrics[metric]
                cells.append(f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}"))
            found = differences.get(task.task, {}).get(metric)
            more = "" if found is None else f"{found.value:>+10.4f}  {_span(found)}"
            print(f"  {metric:<22}" + "".join(f"{cell:>20}" for cell in cells) + more)


def _record(
    args: argparse.Namespace,
    columns: list[Evaluation],
    comparison: Comparison | None,
    differences: dict[str, dict[str, Estimate]],
) -> bool:
    """Put what was measured into the report of the model, in place of an earlier entry under the same conditions.

    Of the other model only what a dense one gave: the report says nothing of other pruned models, packed or not.
    """
    from ..engine.report import read_report, update_report

    ours = columns[0]
    dense = columns[1] if len(columns) == 2 and not columns[1].pruned else None
    before = read_report(args.model)
    parts: dict[str, Any] = {}
    if ours.perplexity is not None:
        entry = _perplexity_entry(args, ours, dense, comparison)
        parts["evaluations"] = _replaced(before.get("evaluations", []), [entry], ("dataset", "split", "conditions"))
    if ours.tasks:
        entries = [_task_entry(args, ours, dense, index, differences) for index in range(len(ours.tasks))]
        parts["tasks"] = _replaced(before.get("tasks", []), entries, ("task", "version", "conditions"))
    return update_report(args.model, **parts)


def _replaced(before: list[Any], entries: list[dict[str, Any]], same: tuple[str, ...]) -> list[Any]:
    kept = [other for other in before if all(any(other[key] != entry[key] for key in same) for entry in entries)]
    return [*kept, *entries]


def _perplexity_entry(
    args: argparse.Namespace, ours: Evaluation, dense: Evaluation | None, comparison: Comparison | None
) -> dict[str, Any]:
    assert ours.perplexity is not None
    found = asdict(ours.perplexity)
    is_file = Path(args.text).is_file()
    overlap = "" if args.stride in (None, args.seq_len) else f" with stride {args.stride}"
    entry: dict[str, Any] = {
        "dataset": Path(args.text).name if is_file else args.text,
        "split": None if is_file else args.split,
        "conditions": f"{found['windows']} windows of {found['seq_len']} tokens{overlap}, {ours.dtype}",
        "tokens_sha256": ours.token_digest,
        "metrics": {key: found[key] for key in ("perplexity", "bits_per_byte") if found[key] is not None},
    }
    if dense is not None and dense.perplexity is not None and comparison is not None:
        theirs = asdict(dense.perplexity)
        entry["dense"] = {key: theirs[key] for key in entry["metrics"]}
        entry["comparison"] = asdict(comparison)
    return entry


def _task_entry(
    args: argparse.Namespace,
    ours: Evaluation,
    dense: Evaluation | None,
    index: int,
    differences: dict[str, dict[str, Estimate]],
) -> dict[str, Any]:
    found = ours.tasks[index]
    shots = "" if found.num_fewshot is None else f"{found.num_fewshot} examples each, "
    template = "chat template, " if args.apply_chat_template else ""
    entry: dict[str, Any] = {
        "task": found.task,
        "version": found.version,
        "conditions": f"{found.documents} documents, {shots}{template}{ours.dtype}",
        "metrics": {name: asdict(score) for name, score in found.metrics.items()},
    }
    if dense is not None:
        entry["dense"] = {name: asdict(score) for name, score in dense.tasks[index].metrics.items()}
        entry["difference"] = _plain(differences)[found.task]
    return entry


def _plain(differences: dict[str, dict[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {task: {name: asdict(each) for name, each in found.items()} for task, found in differences.items()}


def _span(found: Estimate) -> str:
    return "" if found.low is None else f"({found.low:.4f} to {found.high:.4f})"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _kept(size: Any) -> str:
    return f"{size.parameters_kept / 1e6:,.1f} M of {size.parameters / 1e6:,.1f} M"
