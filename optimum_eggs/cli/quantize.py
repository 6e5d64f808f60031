"""Store the values of a packed model as integers."""

from __future__ import annotations

import argparse

from .. import strict_json
from ..folders import check_folder
from ..validation import TORCH_SEEDS
from .arguments import add_device, add_shard_size, add_trust, chosen_device, integer
from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize`."""
    from ..dtypes import BITS, GROUP
    from ..presets import NUM_SAMPLES, SEQ_LEN

    add = parser.add_argument
    add("model", metavar="DIR", help="folder of a packed model with floats")
    add("output", metavar="OUT", help="folder to make")
    add("--values", choices=list(BITS), help="integers for the values that are kept (default: none)")
    add(
        "--value-group",
        type=integer(64),
        metavar="N",
        help=f"inputs that share a scale, a multiple of 64 (default: {GROUP})",
    )
    add("--head", choices=["int8"], help="integers for embeddings and output head (default: none)")
    add("--ignored", choices=["int8"], help="integers for layers that were left dense on request (default: none)")
    add("--rounding", choices=["gptq", "nearest"], help="how values are rounded (default: nearest; gptq with int4)")
    add(
        "--rounding-tuning",
        type=integer(0),
        metavar="STEPS",
        help="steps that a block is tuned for with the rounding in the loop (default: half of those it was tuned for "
        "with int4, else 0: none)",
    )
    add(
        "--calibration",
        action="append",
        metavar="TEXT[=SHARE]",
        help="as for prune; not needed to round to the nearest without tuning (default: none)",
    )
    add("--split", metavar="NAME", help="split of a data set from the Hub, such as validation (default: train)")
    add("--text-column", metavar="NAME", help="column of a data set or a file of rows (default: as for prune)")
    add(
        "--num-samples",
        type=integer(1),
        metavar="N",
        default=NUM_SAMPLES,
        help=f"calibration windows (default: {NUM_SAMPLES})",
    )
    add("--seq-len", type=integer(2), metavar="N", help=f"tokens in each (default: {SEQ_LEN}, or the model's context)")
    add("--seed", type=integer(0, TORCH_SEEDS), default=0, metavar="N", help="of everything random (default: 0)")
    add_device(add)
    add_trust(add, "the model")
    add_shard_size(add)
    add("--overwrite", action="store_true", help="replace what this package wrote at OUT (default: no)")


def check(args: argparse.Namespace) -> None:
    """Refuse a folder that is not there."""
    check_folder(args.model)


def run(args: argparse.Namespace) -> int:
    """Round, save, and print what was done."""
    from ..quantize import quantize
    from .prune import parse_sources

    keys = ("values", "value_group", "head", "ignored", "rounding", "rounding_tuning", "split", "text_column")
    settings = {key: getattr(args, key) for key in (*keys, "num_samples", "seq_len", "seed")}
    with others_on_stderr():
        done = quantize(
            args.model,
            args.output,
            settings | {"calibration": parse_sources(args.calibration or [])},
            device=chosen_device(args),
            overwrite=args.overwrite,
            max_shard_size=args.max_shard_size,
            trust_remote_code=args.trust_remote_code,
        )
    if args.json:
        print(strict_json.dumps(done | {"output": args.output}))
        return 0
    how = f"{done['values']} ({done['rounding']}, {done['value_group']} inputs a scale)" if done["values"] else "floats"
    left = "".join(f", {key} {done[key]}" for key in ("head", "ignored") if done[key])
    print(f"{done['modules']} modules in integers: values {how}{left}")
    if done["tuning"]:
        before, after = (sum(errors) / len(errors) for errors in zip(*done["tuning"], strict=True))
        print(f"blocks tuned: mean error on the calibration windows {before:.4f} -> {after:.4f}")
    print(f"saved to {args.output}")
    return 0
