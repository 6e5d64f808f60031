"""Prune a model to N:M and save it packed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from ..errors import ConfigError, more
from ..validation import TORCH_SEEDS
from .arguments import (
    add_device,
    add_shard_size,
    add_trust,
    check_source,
    chosen_device,
    integer,
    parse_shares,
    rare,
    size,
)
from .printing import others_on_stderr
from .settings import add_set, make_config

if TYPE_CHECKING:
    from ..config import EGGSConfig
    from ..engine import PruneReport
    from ..ranks import Ranks


_FLAGS = (
    "pattern",
    "preset",
    "calibration",
    "split",
    "text_column",
    "num_samples",
    "generated_samples",
    "seq_len",
    "sampling",
    "seed",
    "batch_size",
    "min_degree",
    "block_tuning",
    "values",
    "value_group",
    "head",
    "ignored",
    "targets",
    "ignore",
)
"""The keys of the configuration that have a flag of their own; `--set` reaches every choice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prune`."""
    from ..dtypes import BITS, DTYPES, GROUP
    from ..presets import NUM_SAMPLES, PRESETS, SEQ_LEN

    parser.usage = "%(prog)s MODEL OUT --calibration TEXT [options]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, id on the Hub, or GGUF file of a dense model")
    add("output", metavar="OUT", help="folder to make")
    add(
        "--calibration",
        action="append",
        metavar="TEXT[=SHARE]",
        help="file of text or of rows (.jsonl, .csv, ...), data set (wikitext2, c4, or ID[:CONFIGURATION][@REVISION] "
        "on the Hub), or sample, the text shipped here; several are mixed by their shares, such as a.txt=3 (required)",
    )
    add("--pattern", default="2:4", metavar="N:M", help="N kept of every M (default: 2:4)")
    add("--preset", choices=list(PRESETS), default="fast", metavar="NAME", help=f"{', '.join(PRESETS)} (default: fast)")
    add(
        "--num-samples",
        type=integer(1),
        default=NUM_SAMPLES,
        metavar="N",
        help=f"calibration windows (default: {NUM_SAMPLES})",
    )
    add(
        "--seq-len",
        type=integer(2),
        metavar="N",
        help=f"tokens in each (default: {SEQ_LEN}, or the model's context)",
    )
    add(
        "--batch-size",
        type=integer(1),
        metavar="N",
        help="windows run at a time (default: 4; 1 where blocks are tuned)",
    )
    add(
        "--ignore",
        nargs="+",
        metavar="NAME",
        default=["lm_head"],
        help="leave these dense, such as lm_head down_proj 'layers.0.*' (default: lm_head)",
    )
    add("--values", choices=list(BITS), help="integers for the values that are kept (default: none, floats)")
    add("--head", choices=["int8"], help="integers for embeddings and output head (default: none, floats)")
    add("--ignored", choices=["int8"], help="integers for layers left dense on request (default: none, floats)")
    add_device(add)
    add(
        "--memory-budget",
        type=size(0),
        metavar="SIZE",
        help="memory for hidden states, such as 8GiB; if they take more, all are on disk (default: no limit)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace what this package wrote at OUT (default: no)",
    )
    add_set(parser)

    add_rare = rare(parser)
    add_rare("--split", metavar="NAME", help="split of a data set from the Hub, such as validation (default: train)")
    add_rare(
        "--text-column",
        metavar="NAME",
        help="column of a data set or a file of rows (default: input_ids if it has one, else text)",
    )
    add_rare(
        "--generated-samples",
        type=integer(0),
        default=0,
        metavar="N",
        help="windows that the dense model writes besides (default: 0)",
    )
    add_rare(
        "--sampling", choices=["random", "sequential"], default="random", help="how windows are drawn (default: random)"
    )
    add_rare("--seed", type=integer(0, TORCH_SEEDS), default=0, metavar="N", help="of everything random (default: 0)")
    add_rare(
        "--min-degree",
        type=integer(0),
        metavar="N",
        help="outputs that every input keeps in every band of rows (default: as the preset says; 1 with fast and best)",
    )
    add_rare(
        "--block-tuning",
        type=integer(0),
        metavar="STEPS",
        help="steps that a block is tuned for (default: as the preset says; 200 with best, else 0: none)",
    )
    add_rare(
        "--value-group",
        type=integer(64),
        metavar="N",
        help=f"inputs that share a scale, a multiple of 64 (default: {GROUP})",
    )
    add_rare(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="prune only these layers, such as down_proj 'layers.*.mlp.*' (default: all in the blocks)",
    )
    add_rare("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    add_trust(add_rare, "MODEL")
    add_rare("--gguf-file", metavar="NAME", help="name of a GGUF file in MODEL (default: none, its safetensors)")
    add_rare("--dtype", choices=DTYPES, default="auto", help="dtype to load and prune in (default: auto, as stored)")
    add_rare("--save-dtype", choices=DTYPES, default="auto", help="dtype to save in (default: auto, as loaded)")
    add_shard_size(add_rare)
    parser.set_defaults(**dict.fromkeys(_FLAGS))  # what is not given is left to the configuration, and to --set


def check(args: argparse.Namespace) -> None:
    """Refuse a MODEL that is nowhere."""
    check_source(args.model)


def run(args: argparse.Namespace) -> int:
    """Prune, save, and print what was done."""
    from ..calibration.documents import SOURCES
    from ..calibration.windows import check_calibration
    from ..devices import choose_device
    from ..folders import check_output
    from ..ranks import join_ranks

    ranks = join_ranks(cpu=choose_device(args.device).type == "cpu")
    # Everything that can be refused is refused before a model is loaded.
    check_output(args.output, args.overwrite, sources=[args.model])
    flags = {key: getattr(args, key) for key in _FLAGS}
    config = make_config(flags | {"calibration": parse_sources(args.calibration or [])}, args.set)
    if config.calibration is None:
        raise ConfigError(f"--calibration is missing: give {SOURCES}")
    check_calibration(config.calibration)
    with others_on_stderr():
        if _is_on_disk(args):
            report = _from_disk(args, config, ranks)
        elif ranks.size == 1:
            report = _in_memory(args, config)
        else:
            raise ConfigError(
                f"{args.model}: is not in safetensors files, which alone {ranks.size} processes can prune together; "
                "save the model to a folder first"
            )
    if not ranks.first:
        return 0
    if args.json:
        print(strict_json.dumps(report.to_dict() | {"output": args.output}))
        return 0
    summary = report.to_dict()["summary"]
    seconds = report.measurements["seconds"] + report.measurements.get("seconds_of_earlier_runs", 0)
    print(f"{summary['layers_pruned']} layers pruned to {summary['pattern']} in {seconds:.0f} s")
    print(f"mean relative error {summary['mean_relative_error']:.4f}, starved inputs {summary['starved_inputs']}")
    turned = report.rotation or {}
    if "lost_after" in turned:
        before, after = turned["lost_before"], turned["lost_after"]
        print(f"rotated: a plain mask loses {before:.4f} -> {after:.4f} of the importance")
    elif turned:
        print(f"not rotated: {turned['reason']}")
    alone, least = summary["layers_by_weights_alone"], report.config["min_expert_tokens"]
    if alone:
        print(f"layers of experts that saw under {least} tokens, pruned by their weights alone: {alone}")
    if report.tuning:
        before, after = (
            sum(getattr(block, key) for block in report.tuning) / len(report.tuning)
            for key in ("error_before", "error_after")
        )
        print(f"blocks tuned: mean error on the calibration windows {before:.4f} -> {after:.4f}")
    if report.left_dense:
        print(f"left dense: {', '.join(layer.name for layer in report.left_dense[:6])}" + more(report.left_dense, 6))
    print(f"saved to {args.output}")
    return 0


def _is_on_disk(args: argparse.Namespace) -> bool:
    """Whether the model can be read block by block; a GGUF file and pickled weights cannot."""
    from ..hf.loading import split_gguf
    from ..streaming import is_streamable

    return split_gguf(args.model, args.gguf_file)[1] is None and is_streamable(args.model, args.revision)


def _from_disk(args: argparse.Namespace, config: EGGSConfig, ranks: Ranks) -> PruneReport:
    """One block in memory at a time."""
    from ..streaming import prune_checkpoint

    return prune_checkpoint(
        args.model,
        args.output,
        config,
        dtype=args.dtype,
        save_dtype=None if args.save_dtype == "auto" else args.save_dtype,
        device=chosen_device(args) if ranks.size == 1 else ranks.device,
        memory_budget=args.memory_budget,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        ranks=ranks,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )


def _in_memory(args: argparse.Namespace, config: EGGSConfig) -> PruneReport:
    """The model as a whole in memory."""
    from ..devices import device_map
    from ..folders import check_output
    from ..pruner import EGGSPruner
    from ..sharing import own_card

    if args.memory_budget is not None:
        raise ConfigError(
            f"memory_budget={args.memory_budget!r}: {args.model} is not in safetensors files, which alone are read "
            "block by block; leave --memory-budget out, or save the model to a folder first"
        )
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    options |= {"device_map": device_map(chosen_device(args))}
    options |= {"revision": args.revision} if args.revision else {}
    pruner = EGGSPruner.from_pretrained(args.model, gguf_file=args.gguf_file, dtype=args.dtype, **options)
    own_card(Path(args.output))  # what is wrong with it is better known before
    least = sum(value.nbytes for value in pruner.model.parameters()) * config.n // config.m
    check_output(args.output, args.overwrite, sources=[args.model], needs=least)
    report = pruner.prune(config)
    pruner.save_pretrained(
        args.output,
        overwrite=args.overwrite,
        dtype=None if args.save_dtype == "auto" else args.save_dtype,
        max_shard_size=args.max_shard_size,
    )
    return report


def parse_sources(given: list[str]) -> str | dict[str, float] | None:
    """`["a.txt"]` to `"a.txt"`; `["a.txt=3", "c4"]` to `{"a.txt": 3.0, "c4": 1.0}`.

    Raises:
        ConfigError: a source is named twice.
        CalibrationError: a share is not a positive number.

    >>> parse_sources(["a.txt=3", "c4"])
    {'a.txt': 3.0, 'c4': 1.0}
    """
    sources = parse_shares(given, "calibration")
    return next(iter(sources)) if len(sources) == 1 else sources or None
