"""Train a packed model back towards its dense teacher, under its mask; it stays packed."""

from __future__ import annotations

import argparse

from .. import strict_json
from ..folders import check_folder
from ..validation import NUMPY_SEEDS
from .arguments import add_device, add_trust, check_source, chosen_device, integer, number, parse_shares
from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `recover`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--train",
        required=True,
        action="append",
        metavar="TEXT[=SHARE]",
        help="text to train on: a file, a data set such as wikitext2, or sample, the text shipped here; several are "
        "mixed, by their shares if they are given, such as a.txt=3 (required)",
    )
    parser.add_argument(
        "--text-column", help="column of a data set or of a file of rows (default: input_ids if it has one, else text)"
    )
    parser.add_argument("--teacher", metavar="DENSE", help="dense model to match (default: none, learn from the text)")
    parser.add_argument("--method", choices=["lora", "values"], default="lora", help="what is trained (default: lora)")
    parser.add_argument("--rank", type=integer(1), default=16, metavar="N", help="rank of the LoRA (default: 16)")
    parser.add_argument("--steps", type=integer(1), default=200, metavar="N", help="optimiser steps (default: 200)")
    parser.add_argument(
        "--lr",
        type=number(above=0),
        help="highest learning rate, as a share of the weights' root mean square (default: 5e-3 lora, 5e-4 values)",
    )
    parser.add_argument(
        "--seq-len", type=integer(2), metavar="N", help="tokens in a window (default: 512, or the model's context)"
    )
    parser.add_argument(
        "--batch-size", type=integer(1), default=4, metavar="N", help="windows in a step of each process (default: 4)"
    )
    parser.add_argument(
        "--kd-ratio",
        type=number(above=0, most=1),
        default=1.0,
        metavar="SHARE",
        help="share of the teacher in the loss, the rest being the text's own next tokens (default: 1)",
    )
    parser.add_argument(
        "--block-matching",
        type=number(least=0),
        default=0.0,
        metavar="WEIGHT",
        help="match the output of the teacher's blocks too, with this weight (default: 0, off)",
    )
    parser.add_argument(
        "--held-out",
        type=number(least=0, below=1),
        default=0.05,
        metavar="SHARE",
        help="windows kept from training to judge it by, as a share of those trained on; 0: none, and the last state "
        "stays, for a text that the model was calibrated on (default: 0.05)",
    )
    parser.add_argument(
        "--seed", type=integer(0, NUMPY_SEEDS), default=0, metavar="N", help="of the order of the windows (default: 0)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time (default: off)")
    add_device(parser.add_argument)
    add_trust(parser.add_argument, "the model or the teacher")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what this package wrote at OUT (default: no)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a folder that is not there."""
    check_folder(args.model)
    if args.teacher is not None:
        check_source(args.teacher, "--teacher")


def run(args: argparse.Namespace) -> int:
    """Train, write, and print."""
    from accelerate import PartialState

    from ..malloc import keep_freed_memory
    from ..recovery.recover import RecoverySettings, recover

    keep_freed_memory()  # here, since it changes the whole process
    shares = parse_shares(args.train, "train")
    settings = RecoverySettings(
        args.train if list(shares) == args.train else shares,  # names as they were given have no share behind them
        teacher=args.teacher,
        method=args.method,
        rank=args.rank,
        steps=args.steps,
        learning_rate=args.lr,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        kd_ratio=args.kd_ratio,
        block_matching=args.block_matching,
        held_out=args.held_out,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
        text_column=args.text_column,
    )
    try:
        with others_on_stderr():
            report = recover(
                args.model,
                args.output,
                settings,
                overwrite=args.overwrite,
                device=chosen_device(args),
                trust_remote_code=args.trust_remote_code,
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or "the same command goes on from the last checkpoint") from None
    if not PartialState().is_main_process:
        return 0
    if args.json:
        print(strict_json.dumps(report.to_dict() | {"output": args.output}))
        return 0
    took = report.measurements
    print(f"{report.steps} steps on {report.windows} windows in {took['seconds']:.0f} s")
    if report.windows_held_out:
        change = f"{report.perplexity_before:.2f} -> {report.perplexity_after:.2f}"
        print(f"perplexity on the {report.windows_held_out} windows held out {change}")
    else:
        print("no window was held out, so nothing was judged")
    if report.kept == "before":
        print("training made it worse: the values of before were kept; more text or a smaller --lr may help")
    print(f"saved to {args.output}")
    return 0
