"""Time a packed model on this machine: its layers against dense ones, and the model against its dense twin."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from typing import Any

from .. import strict_json
from .arguments import add_device, add_trust, check_both, chosen_device, integer
from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark`."""
    from ..dtypes import DTYPES

    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument(
        "--against", metavar="DENSE", help="folder of a dense model, timed in turn with the packed one (default: none)"
    )
    parser.add_argument(
        "--batch",
        type=integer(1),
        nargs="+",
        default=[1, 4, 16, 64, 256],
        metavar="N",
        help="tokens in a layer's call (default: 1 4 16 64 256)",
    )
    parser.add_argument(
        "--prompt", type=integer(1), default=256, metavar="N", help="tokens in the prompt (default: 256)"
    )
    parser.add_argument(
        "--new-tokens", type=integer(1), default=128, metavar="N", help="tokens to decode (default: 128)"
    )
    parser.add_argument(
        "--sequences", type=integer(1), default=1, metavar="N", help="sequences read and decoded together (default: 1)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="let packed models decode by compile_generation (default: as they are)"
    )
    parser.add_argument("--repeats", type=integer(1), default=3, metavar="N", help="timed runs of a model (default: 3)")
    parser.add_argument(
        "--layer-repeats",
        type=integer(1),
        default=20,
        metavar="N",
        help="timed turns of a layer, of some calls (default: 20)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype to run in (default: the checkpoint's)")
    add_device(parser.add_argument)
    add_trust(parser.add_argument, "the models")
    parser.add_argument(
        "--no-record",
        action="store_true",
        help="leave the report of DIR as it is (default: write it, with one of --sequences)",
    )
    parser.add_argument("--layers-only", action="store_true", help="leave the models out (default: time them too)")


check = check_both


def run(args: argparse.Namespace) -> int:
    """Time, and print."""
    import torch

    from ..devices import described
    from ..engine.report import timed_on, update_report
    from ..errors import ConfigError
    from ..hf.loading import parse_dtype, stored_dtype
    from ..inspection import inspect_checkpoint
    from ..measure import processor
    from ..ops import INSTRUCTION_SETS
    from ..packing.codes import Coding
    from ..pattern import NMPattern
    from ..speed import check_models, read_bandwidth, time_layer, time_models
    from .recording import may_record, recorded

    device = chosen_device(args)
    if args.compile and device.type != "cpu":
        raise ConfigError(f"--compile is for the CPU, and the models go to {device}; leave it out, or add --device cpu")
    with others_on_stderr():
        found = inspect_checkpoint(args.model)
    found.raise_first("`inspect` lists all")
    shapes: dict[tuple[int, int, str, str | None], int] = {}
    for layer in found.layers:
        shape = (layer.out_features, layer.in_features, layer.pattern, layer.coding)
        shapes[shape] = shapes.get(shape, 0) + 1
    folders = [args.model] + ([args.against] if args.against else [])
    if not args.layers_only:
        check_models(folders, args.prompt, args.new_tokens, args.trust_remote_code)
    recording = not (args.layers_only or args.no_record or args.sequences > 1) and may_record(args.model)
    wanted = parse_dtype(args.dtype)
    dtype = wanted if isinstance(wanted, torch.dtype) else stored_dtype(args.model, args.trust_remote_code)

    bandwidth = read_bandwidth() if device.type == "cpu" else None
    models = []
    if not args.layers_only:
        with others_on_stderr():
            models = time_models(
                folders,
                prompt=args.prompt,
                new_tokens=args.new_tokens,
                sequences=args.sequences,
                compiled=args.compile,
                repeats=args.repeats,
                dtype=args.dtype,
                device=device,
                trust_remote_code=args.trust_remote_code,
            )
    timings = [
        time_layer(
            out,
            inner,
            NMPattern.parse(pattern),
            dtype,
            batch,
            args.layer_repeats,
            device=device,
            coding=None if coding is None else Coding.parse(coding),
        )
        for out, inner, pattern, coding in shapes
        for batch in args.batch
    ]
    machine = {
        "processor": processor(),
        "instruction_set": INSTRUCTION_SETS[-1] if INSTRUCTION_SETS else None,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": None if device.type == "cpu" else described(device),
        "read_bandwidth": bandwidth,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    rows = [asdict(timing) | {"ratio": timing.ratio, "layers": shapes[_shape(timing)]} for timing in timings]
    if recording:
        timed = [_without_folder(model) for model in models[:1] + [other for other in models[1:] if not other.packed]]
        how = {"prompt": args.prompt, "new_tokens": args.new_tokens, "dtype": str(dtype).removeprefix("torch.")}
        part = {"machine": machine, **how, "layers": rows, "models": timed}
        recorded(lambda: update_report(args.model, benchmark=part))
    if args.json:
        print(strict_json.dumps({"machine": machine, "layers": rows, "models": [asdict(model) for model in models]}))
        return 0
    read = f", {bandwidth:.1f} GB/s read" if bandwidth else ""
    kernels = f", {machine['instruction_set'] or 'native kernels missing'}" if device.type == "cpu" else ""
    print(f"{timed_on(machine)}{kernels}{read}\n")
    heads = f"{'out x in':>14} {'n:m':>5} {'values':>9} {'layers':>6} {'tokens':>6} {'backend':>9}"
    print(f"{heads} {'µs':>9} {'times dense':>12}   GB/s")
    for timing in timings:
        size = f"{timing.out_features} x {timing.in_features}"
        share = f"{timing.gigabytes_per_second:6.1f}" + (
            f" ({timing.gigabytes_per_second / bandwidth:.0%})" if bandwidth else ""
        )
        what = f"{size:>14} {timing.pattern:>5} {timing.coding or timing.dtype:>9} {shapes[_shape(timing)]:>6}"
        took = f"{timing.packed.median * 1e6:9.1f} {timing.ratio:12.2f} {share}"
        print(f"{what} {timing.tokens:>6} {timing.backend:>9} {took}")
    for line in _model_table(models, args):
        print(line)
    return 0


def _without_folder(model: Any) -> dict[str, Any]:
    """As JSON types, without a path of this machine: the report is published."""
    return {key: value for key, value in asdict(model).items() if key != "folder"}


def _shape(timing: Any) -> tuple[int, int, str, str | None]:
    return timing.out_features, timing.in_features, timing.pattern, timing.coding


def _model_table(models: list[Any], args: argparse.Namespace) -> list[str]:
    """Lines for one model, or for two and their ratio."""
    if not models:
        return []
    rows: list[tuple[str, list[float], str]] = [
        (f"prefill of {args.prompt}, tokens/s", [model.prefill_speed for model in models], ".1f"),
        (f"decode of {args.new_tokens}, tokens/s", [model.decode_speed for model in models], ".2f"),
        ("a step of decoding, ms", [model.parts.step * 1e3 for model in models], ".2f"),
        ("  linear layers in blocks", [model.parts.matrices * 1e3 for model in models], ".2f"),
        ("  output head", [model.parts.head * 1e3 for model in models], ".2f"),
        ("  all else", [model.parts.rest * 1e3 for model in models], ".2f"),
        ("memory grown by, MB", [model.resident / 1e6 for model in models], ".1f"),
        ("weights, MB", [model.weights / 1e6 for model in models], ".1f"),
    ]
    if None not in (limits := [model.parts.limit for model in models]):
        rows.insert(6, ("share of its bytes' limit", limits, ".1%"))
    width = max(16, *(len(model.folder) + 2 for model in models))
    lines = ["", f"{'':<28}" + "".join(f"{model.folder:>{width}}" for model in models)]
    if len(models) > 1:
        lines[-1] += f"{'ratio':>9}"
    for label, values, style in rows:
        ratio = f"{values[0] / values[1]:9.3f}" if len(values) > 1 and values[1] else ""
        lines.append(f"{label:<28}" + "".join(f"{value:>{width}{style}}" for value in values) + ratio)
    return lines
