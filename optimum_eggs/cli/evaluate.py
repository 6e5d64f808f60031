"""Measure a saved model: perplexity, tasks, size on disk, parameters kept; against another model, if one is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from .arguments import add_device, add_trust, check_both, chosen_device, integer
from .printing import others_on_stderr

if TYPE_CHECKING:
    from ..evaluation import Comparison, Estimate, Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    from ..dtypes import DTYPES

    parser.add_argument("model", metavar="DIR", help="folder of a model, packed or dense")
    parser.add_argument(
        "--text",
        metavar="FILE|NAME",
        help="text to predict: a file of text or of rows (.jsonl, .json, .csv, .tsv, .parquet), or a data set, such as "
        "wikitext2 (default: none)",
    )
    parser.add_argument("--split", default="test", help="split of a data set from the Hub (default: test)")
    parser.add_argument(
        "--text-column", help="column of a data set or of a file of rows (default: input_ids if it has one, else text)"
    )
    parser.add_argument(
        "--seq-len",
        type=integer(2),
        metavar="N",
        help="tokens in a window (default: 1024, or the models' context where shorter)",
    )
    parser.add_argument(
        "--stride",
        type=integer(1),
        metavar="N",
        help="tokens from one window to the next; those that overlap are read, not predicted (default: --seq-len)",
    )
    parser.add_argument("--num-windows", type=integer(1), metavar="N", help="use only the first windows (default: all)")
    parser.add_argument(
        "--batch-size", type=integer(1), default=1, metavar="N", help="windows or requests run at a time (default: 1)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to run in (default: the checkpoint's)")
    add_device(parser.add_argument)
    add_trust(parser.add_argument, "the models")
    parser.add_argument("--no-record", action="store_true", help="leave the report of DIR as it is (default: write it)")
    parser.add_argument(
        "--against", metavar="DENSE", help="folder of another model, compared on the same data (default: none)"
    )
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install lm_eval)")
    tasks.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks, groups or tags to run, such as arc_easy (default: none)"
    )
    tasks.add_argument("--include-path", metavar="DIR", help="folder with YAML files of further tasks (default: none)")
    tasks.add_argument(
        "--num-fewshot", type=integer(0), metavar="N", help="examples before each question (default: as the task says)"
    )
    tasks.add_argument(
        "--limit", type=integer(1), metavar="N", help="only the first documents of each task, to try (default: all)"
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="ask as the tokenizer's chat template says (default: the plain text)",
    )


check = check_both


def run(args: argparse.Namespace) -> int:
    """Measure, record, and print."""
    from ..evaluation import evaluate, record
    from ..files import REPORT_NAME
    from .recording import may_record, recorded

    recording = not args.no_record and may_record(args.model)
    device = chosen_device(args)
    with others_on_stderr():
        found = evaluate(
            args.model,
            args.against,
            text=args.text,
            split=args.split,
            text_column=args.text_column,
            seq_len=args.seq_len,
            stride=args.stride,
            num_windows=args.num_windows,
            tasks=args.tasks,
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            batch_size=args.batch_size,
            dtype=args.dtype,
            device=device,
            trust_remote_code=args.trust_remote_code,
        )
    put = recording and recorded(lambda: record(found))
    if args.json:
        print(strict_json.dumps(found.to_dict()))
        return 0
    columns = [found.model, *([] if found.against is None else [found.against])]
    _print_columns(columns)
    if found.comparison is not None:
        _print_comparison(found.comparison)
    if found.model.tasks:
        _print_tasks(columns, found.task_differences)
    if found.model.text_uses:
        print(f"note: the model was also {' and '.join(found.model.text_uses)} on {found.conditions.text}")
    if put:
        print(f"recorded in {Path(args.model) / REPORT_NAME}, for the model card")
    return 0


def _print_columns(columns: list[Evaluation]) -> None:
    rows = [("", [column.folder or "" for column in columns])]
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
    width = max(24, *(len(column.folder or "") + 2 for column in columns))
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
                score = column.tasks[index].metrics.get(metric)
                error = "" if score is None or score.stderr is None else f" ± {score.stderr:.4f}"
                cells.append("" if score is None else f"{score.value:.4f}{error}")
            found = differences.get(task.task, {}).get(metric)
            more = "" if found is None else f"{found.value:>+10.4f}  {_span(found)}"
            print(f"  {metric:<22}" + "".join(f"{cell:>20}" for cell in cells) + more)


def _span(found: Estimate) -> str:
    return "" if found.low is None else f"({found.low:.4f} to {found.high:.4f})"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def _kept(size: Any) -> str:
    return f"{size.parameters_kept / 1e6:,.1f} M of {size.parameters / 1e6:,.1f} M"
