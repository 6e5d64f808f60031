"""Feed mutated packed checkpoints to `inspect` and to `from_pretrained` with one forward pass.

    python tests/fuzz/fuzz_checkpoints.py --runs 20000 --sanitize
    python tests/fuzz/fuzz_checkpoints.py --runs 20000 --sanitize --format-version 2

A case is its number: the same number makes the same checkpoint, from those of `corpus()`, or from those of one version
of the format. A worker runs cases one after the other; when it dies, hangs, grows beyond its limit or meets a case that
ends in anything but a typed error or a right answer, the number is printed, and `--only NUMBER`, with the same
`--format-version`, runs that case alone. `--sanitize` builds the kernels with gcc's address and undefined-behaviour
sanitizers first.

What is mutated is what this package reads: the `quantization_config`, the safetensors files to the byte, and the index.
The rest of config.json says how large a model transformers builds, before this package is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES_PER_WORKER = 250
SECONDS_PER_CASE = 20
MEMORY_GROWTH = 512 * 2**20
"""Bytes a worker may grow by over all its cases: each checkpoint has fewer than a hundred thousand."""

JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 4, 7, 32, 33, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *("", "2:4", "4:2", "0:4", "4:4", "1:2", "2:4:8", "-2:4", "2:0", "²:4", "2:4 ", "02:4", "2.0:4", ":", "auto"),
    *("int8", "int4", "int8:128", "int4:64", "int4:63", "int8:0", "int9:64", "int8:64:64", "int4:99999999999999999999"),
    *("none", "eggs", "\0", "../../etc/passwd", "x" * 5000, [], [0], ["2:4"], {}, {"": ""}, {"n": 2, "m": 4}, [[[]]]),
]
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1}


@dataclass
class Checkpoint:
    """A checkpoint as parts that can be changed: tensors are [dtype, shape, bytes]."""

    config: dict[str, Any]
    tensors: dict[str, list[Any]]
    extra: dict[str, bytes] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """The header of a safetensors file that holds the tensors one after the other."""
        made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return made

    def weights(self, header: dict[str, Any] | None = None) -> bytes:
        """The safetensors file."""
        text = json.dumps(self.header() if header is None else header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in self.tensors.values())


def corpus(version: int | None = None) -> list[Path]:
    """Sound checkpoints: of every dtype, of several patterns, with biases, with a transposed layer, of a mixture.

    With `version`, those of that version of the format alone.
    """
    folders = sorted((Path(__file__).parent / "corpus").iterdir())
    return [folder for folder in folders if version in (None, format_version(folder))]


def format_version(folder: Path) -> int:
    """The version of the format that a checkpoint says it has."""
    version: int = json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]
    return version


def read(folder: Path) -> Checkpoint:
    """A sound checkpoint, taken apart."""
    tensors: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = [entry["dtype"], entry["shape"], data[start:end]]
    return Checkpoint(json.loads((folder / "config.json").read_text()), tensors)


def mutated(number: int, version: int | None = None) -> dict[str, bytes]:
    """The files of case `number`."""
    draw = random.Random(number)
    found = read(draw.choice(corpus(version)))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice((change_config, change_list, change_tensor, change_tensor, change_bits))(found, draw)
    weights = found.weights()
    kind = draw.random()
    if kind < 0.25:
        weights = change_header(found, draw)
    elif kind < 0.5:
        weights = change_bytes(weights, draw)
    files = {"config.json": json.dumps(found.config).encode(), "model.safetensors": weights}
    if draw.random() < 0.15:
        files |= change_index(found, weights, draw)
        if draw.random() < 0.7:
            del files["model.safetensors"]  # only now is the index read
    return files


def change_config(found: Checkpoint, draw: random.Random) -> None:
    """A value of the `quantization_config`, or one more, or one less."""
    packed = found.config["quantization_config"]
    key = draw.choice(
        [*packed, "surprise", "format_version", "quant_method", "pruned_modules", "coded_modules", "n", "m"]
    )
    if draw.random() < 0.2:
        packed.pop(key, None)
    else:
        packed[key] = draw.choice(JUNK)


def change_list(found: Checkpoint, draw: random.Random) -> None:
    """The list of packed layers, or of modules of integers."""
    key = draw.choice(("pruned_modules", "coded_modules"))
    packed = found.config["quantization_config"]
    listed = packed.get(key) or packed.get("pruned_modules")
    if not isinstance(listed, dict) or not listed:
        return
    name = draw.choice(list(listed))
    what = draw.randrange(4)
    if what == 0:
        listed[name] = draw.choice(JUNK)
    elif what == 1:
        del listed[name]
    elif what == 2:
        listed[
            draw.choice(["", "model", "lm_head", "model.layers", "model.embed_tokens", "model.norm", name + ".weight"])
        ] = draw.choice(("2:4", "int8:128"))
    else:
        listed[name.replace("0", draw.choice(["1", "00", "-1", "٠"]))] = listed.pop(name)


def change_tensor(found: Checkpoint, draw: random.Random) -> None:
    """Shape, dtype, name or size of a tensor, most often of a packed one."""
    packed = [
        name for name in found.tensors if name.endswith(("proj.weight", "weight_meta", "weight_scale", "proj.bias"))
    ]
    name = draw.choice(packed if packed and draw.random() < 0.9 else list(found.tensors))
    tensor = found.tensors[name]
    dtype, shape, data = tensor
    what = draw.randrange(8)
    if what == 0:
        tensor[0] = draw.choice(list(SIZES))
    elif what == 1:  # other dtype, and a shape that goes with it
        other = draw.choice(list(SIZES))
        tensor[0], tensor[1] = other, [len(data) // SIZES[other]]
    elif what == 2:
        tensor[1] = shape[::-1]
    elif what == 3:
        tensor[1] = draw.choice(
            [[], [0], [1, *shape], [*shape, 1], [-1, *shape[1:]], [2**40, 2**40], [2**63], shape[:1]]
        )
    elif what == 4:  # a row or a column less, honestly
        rows = max(1, shape[0] - 1) if draw.random() < 0.5 or len(shape) < 2 else shape[0]
        columns = [max(1, shape[1] - draw.choice((1, 2, 4)))] if len(shape) > 1 else []
        count = rows * (columns[0] if columns else 1) * SIZES.get(dtype, 1)
        if 0 <= count <= 2**20:  # a change before may have made the shape absurd
            tensor[1], tensor[2] = [rows, *columns], data[:count].ljust(count, b"\0")
    elif what == 5:
        del found.tensors[name]
    elif what == 6:
        found.tensors[draw.choice([name + "x", "x." + name, name.removeprefix("model."), name.upper()])] = (
            found.tensors.pop(name)
        )
    else:
        other = draw.choice(list(found.tensors))
        found.tensors[name], found.tensors[other] = found.tensors[other], found.tensors[name]


def change_bits(found: Checkpoint, draw: random.Random) -> None:
    """The content of a tensor: bits of a mask, or values that are NaN, infinite or subnormal."""
    ending = draw.choice(("weight_meta", "proj.weight", "weight_scale", "weight"))
    names = [name for name in found.tensors if name.endswith(ending)] or list(found.tensors)
    tensor = found.tensors[draw.choice(names)]
    data = bytearray(tensor[2])
    if not data:
        return
    what = draw.randrange(4)
    if what == 0:
        data[:] = bytes([draw.choice((0x00, 0xFF, 0x33, 0x0F, 0x7F, 0x80))]) * len(data)
    elif what == 1:
        data[:] = draw.randbytes(len(data))
    else:
        for _ in range(draw.choice((1, 1, 2, 16))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    tensor[2] = bytes(data)


def change_header(found: Checkpoint, draw: random.Random) -> bytes:
    """A header that says something else than the file holds."""
    header = found.header()
    name = draw.choice(list(found.tensors) or ["__metadata__"])
    entry = header.get(name)
    if isinstance(entry, dict) and "data_offsets" in entry and draw.random() < 0.7:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [
                [start - 8, end - 8],
                [start + 1, end + 1],
                [end, start],
                [0, end - start],
                [start, 2**63],
                [-1, end],
                [0],
                None,
            ]
        )
    else:
        header[name] = draw.choice(JUNK)
    return found.weights(header)


def change_bytes(weights: bytes, draw: random.Random) -> bytes:
    """Bytes of the file, its length, or the length that it states of its header."""
    what = draw.randrange(5)
    if what == 0:
        return weights[: draw.randrange(len(weights) + 1)]
    if what == 1:
        return weights + draw.randbytes(draw.choice((1, 8, 4096)))
    if what == 2:
        return struct.pack("<Q", draw.choice((0, 1, 2**20, 2**32, 2**63, 2**64 - 1))) + weights[8:]
    data = bytearray(weights)
    (length,) = struct.unpack_from("<Q", weights)
    limit = min(len(data), 8 + length) if what == 3 else len(data)
    for _ in range(draw.choice((1, 2, 8))):
        data[draw.randrange(limit)] = draw.randrange(256)
    return bytes(data)


def change_index(found: Checkpoint, weights: bytes, draw: random.Random) -> dict[str, bytes]:
    """An index beside the file, right or wrong."""
    target = draw.choice(
        [
            "model.safetensors",
            "other.safetensors",
            "../model.safetensors",
            "/etc/passwd",
            "",
            ".",
            "config.json",
            None,
            3,
            [],
        ]
    )
    index: Any = {"metadata": {"total_size": draw.choice(JUNK)}, "weight_map": dict.fromkeys(found.tensors, target)}
    if draw.random() < 0.3:
        index[draw.choice(["metadata", "weight_map"])] = draw.choice(JUNK)
    files = {"model.safetensors.index.json": json.dumps(index).encode()}
    if draw.random() < 0.5:
        files["other.safetensors"] = weights
    return files


def outcome(folder: Path) -> str:
    """What becomes of the checkpoint in `folder`: the name of the typed error, or "right"; raises for all else."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_eggs.errors import EGGSError
    from optimum_eggs.hf.loading import load_model, own_memory
    from optimum_eggs.inspection import inspect_checkpoint
    from optimum_eggs.ops import force

    found = inspect_checkpoint(folder, progress=False)
    json.dumps(found.to_dict())
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except EGGSError as error:
        return type(error).__name__
    except Exception as error:
        if any("optimum_eggs" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        # Refused by transformers or safetensors before this package is asked. Its own commands give it a type.
        try:
            load_model(folder)
        except EGGSError as typed:
            return f"{type(typed).__name__} of what transformers refuses"
        raise
    own_memory(model)  # buffers of exactly their size, so that a sanitizer sees a read beyond them
    for module in model.modules():
        for part in ("weight_meta", "weight_scale"):
            if getattr(module, part, None) is not None:
                setattr(module, part, getattr(module, part).clone())
    ids = torch.arange(5)[None]
    with torch.no_grad():
        given = model(input_ids=ids).logits.float()
        with force("reference"), by_rounded_inputs():
            expected = model(input_ids=ids).logits.float()
    if bool(torch.isfinite(expected).all()):
        scale = expected.abs().max() + 1e-3
        worst = float((given - expected).abs().max() / scale)
        assert worst < 0.1, f"the kernels are off by {worst:.3g} of the largest logit"
    return "right" if found.ok else "right where it was loaded"


@contextmanager
def by_rounded_inputs() -> Iterator[None]:
    """Have layers of integers multiply as their kernels are to: inputs rounded to bytes, group by group."""
    from optimum_eggs.ops import coded_linear as module

    sys.path.insert(0, str(ROOT / "tests"))
    from oracles import coded_product

    plain = module.run
    module.run = coded_product
    try:
        yield
    finally:
        module.run = plain


def work(numbers: range, report: Path, version: int | None) -> None:
    """Run cases one after the other; `report` holds the number at hand, and then what became of all."""
    import warnings

    import torch
    from transformers.utils import logging

    import optimum_eggs  # noqa: F401  # makes transformers know the format

    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    before = None
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            report.write_text(json.dumps({"case": number, "counts": counts}))
            case = Path(folder) / str(number)
            case.mkdir()
            for name, data in mutated(number, version).items():
                (case / name).write_bytes(data)
            signal.alarm(SECONDS_PER_CASE)
            counts[outcome(case)] += 1
            signal.alarm(0)
            shutil.rmtree(case)
            before = before or peak()
            assert peak() - before < MEMORY_GROWTH, f"memory grew by {(peak() - before) / 2**20:.0f} MiB"
    report.write_text(json.dumps({"case": numbers.stop, "counts": counts}))


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sanitized(folder: Path) -> dict[str, str]:
    """Build the package's kernels with sanitizers in `folder`; the environment that runs them."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "optimum_eggs", folder / "optimum_eggs", ignore=unwanted)
    native = folder / "optimum_eggs" / "ops" / "native"
    # Not by setup.py, whose own -O3 comes behind all other flags: with sanitizers that takes minutes.
    flags = ["-shared", "-fPIC", "-std=c11", "-O1", "-g1", "-fopenmp", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{sysconfig.get_path('include')}"]
    subprocess.run(["gcc", *flags, *native.glob("*.c"), "-o", native / "_native.abi3.so"], check=True)
    asan, ubsan = (
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0", "LD_PRELOAD": f"{asan} {ubsan}"}
    built = {"PYTHONPATH": str(folder), **options}
    loads = [sys.executable, "-c", "import optimum_eggs.ops.native._native"]
    subprocess.run(loads, cwd=folder, env=os.environ | built, check=True)
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run one case in this process")
    parser.add_argument("--sanitize", action="store_true", help="with kernels built with gcc's sanitizers")
    parser.add_argument("--format-version", type=int, choices=(1, 2), help="mutate checkpoints of this version alone")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(range(int(args.worker[0]), int(args.worker[1])), Path(args.worker[2]), args.format_version)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | (sanitized(Path(folder) / "built") if args.sanitize else {})
        first, end = (args.first, args.first + args.runs) if args.only is None else (args.only, args.only + 1)
        return run(first, end, Path(folder), environment, args.format_version)


def run(first: int, end: int, folder: Path, environment: dict[str, str], version: int | None) -> int:
    """Run all cases in worker processes, and print what became of them. Returns the exit status."""
    counts: Counter[str] = Counter()
    failed: list[int] = []
    start, began, report = first, time.monotonic(), folder / "report"
    while start < end:
        stop = min(start + CASES_PER_WORKER, end)
        command = [sys.executable, __file__, "--worker", str(start), str(stop), str(report)]
        command += [] if version is None else ["--format-version", str(version)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = json.loads(report.read_text()) if report.exists() else {"case": start, "counts": {}}
        counts.update(found["counts"])
        start = found["case"]
        if done.returncode:
            failed.append(start)
            print(f"\ncase {start} failed (exit status {done.returncode}):\n{done.stderr[-2000:]}", flush=True)
            start += 1
        report.unlink(missing_ok=True)
        print(f"{start - first} of {end - first} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"{sum(counts.values())} cases: {', '.join(f'{kind} {count}' for kind, count in counts.most_common())}")
    print(f"failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
