"""Pack a dense model that has the zeros of an N:M pattern already, without a change of any value."""

from __future__ import annotations

import argparse
from collections import Counter

from .. import strict_json
from .arguments import add_device, add_shard_size, add_trust, check_source, chosen_device
from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pack`."""
    parser.add_argument("model", metavar="MODEL", help="folder or id on the Hub of a dense model with zeros")
    parser.add_argument("output", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--pattern",
        metavar="N:M",
        help="N nonzero of every M, at the most; other layers stay dense (default: as each layer is)",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="pack only these layers, such as down_proj 'layers.*.mlp.*' (default: all in the blocks)",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        metavar="NAME",
        default=["lm_head"],
        help="leave these dense, such as lm_head down_proj (default: lm_head)",
    )
    parser.add_argument(
        "--block-list", metavar="NAME", help="list of blocks, such as model.layers (default: found by structure)"
    )
    add_device(parser.add_argument)
    add_trust(parser.add_argument, "MODEL")
    add_shard_size(parser.add_argument)
    parser.add_argument("--overwrite", action="store_true", help="replace what this package wrote at OUT (default: no)")


def check(args: argparse.Namespace) -> None:
    """Refuse a MODEL that is nowhere. One without an owner is a folder: no such model on the Hub has zeros to pack."""
    check_source(args.model, bare=False)


def run(args: argparse.Namespace) -> int:
    """Load, pack, save, and print what was found."""
    from pathlib import Path

    from ..devices import device_map
    from ..folders import check_output
    from ..hf.loading import has_tokenizer, load_model
    from ..pattern import NMPattern
    from ..pruner import EGGSPruner

    check_output(args.output, args.overwrite, sources=[args.model])
    options = {"device_map": device_map(chosen_device(args)), "trust_remote_code": args.trust_remote_code}
    pattern = None if args.pattern is None else NMPattern.parse(args.pattern)
    with others_on_stderr():
        if Path(args.model).is_dir() and not has_tokenizer(args.model):
            # no text is read, so no tokenizer is needed
            pruner = EGGSPruner(load_model(args.model, **options))
        else:
            pruner = EGGSPruner.from_pretrained(args.model, **options)
        report = pruner.pack(pattern, targets=args.targets, ignore=args.ignore, block_list=args.block_list)
        pruner.save_pretrained(args.output, overwrite=args.overwrite, max_shard_size=args.max_shard_size)
    if args.json:
        print(strict_json.dumps(report.to_dict() | {"output": args.output}))
        return 0
    counts = Counter(layer.pattern for layer in report.layers)
    print("packed as they are: " + ", ".join(f"{count} layers at {found}" for found, count in counts.most_common()))
    print(f"starved inputs {report.starved_inputs}")
    for layer in report.left_dense:
        print(f"left dense: {layer.name}: {layer.reason}")
    print(f"saved to {args.output}")
    return 0
