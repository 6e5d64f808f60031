"""Train a packed model back towards its dense teacher, under its mask; it stays packed."""

from __future__ import annotations

import argparse
import sys

from .. import strict_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `recover`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--train", required=True, action="append", metavar="FILE|NAME", help="text to train on; several are mixed"
    )
    parser.add_argument(
        "--text-column", help="column of a data set or of a file of rows (default: input_ids if it has one, else text)"
    )
    parser.add_argument("--teacher", metavar="DENSE", help="dense model to match (default: none, learn from the text)")
    parser.add_argument("--method", choices=["lora", "values"], default="lora", help="what is trained (default: lora)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default: 16)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: 200)")
    parser.add_argument(
        "--lr",
        type=float,
        help="highest learning rate, as a share of the weights' root mean square (default: 5e-3 lora, 1.5e-3 values)",
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window (default: 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step of each process (default: 4)")
    parser.add_argument(
        "--block-matching",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="match the output of the teacher's blocks too, with this weight (default: 0, off)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the windows (default: 0)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model or the teacher"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what this package wrote at OUT, and what an interrupted run of other settings has left",
    )


def run(args: argparse.Namespace) -> int:
    """Train, write, and print."""
    from accelerate import PartialState

    from ..recovery.memory import keep_freed_memory
    from ..recovery.recover import RecoverySettings, recover

    keep_freed_memory()  # here, since it changes the whole process
    settings = RecoverySettings(
        args.train,
        teacher=args.teacher,
        method=args.method,
        rank=args.rank,
        steps=args.steps,
        learning_rate=args.lr,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        block_matching=args.block_matching,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
        text_column=args.text_column,
    )
    try:
        report = recover(
            args.model,
            args.output,
            settings,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if not PartialState().is_main_process:
        return 0
    if args.json:
        print(strict_json.dumps(report.to_dict() | {"output": args.output}))
        return 0
    took = report.measurements
    print(f"{report.steps} steps on {report.windows} windows in {took['seconds']:.0f} s")
    change = f"{report.perplexity_before:.2f} -> {report.perplexity_after:.2f}"
    print(f"perplexity on the {report.windows_held_out} windows held out {change}")
    if report.kept == "before":
        print("training made it worse: the values of before were kept; more text or a smaller --lr may help")
    print(f"saved to {args.output}")
    return 0
