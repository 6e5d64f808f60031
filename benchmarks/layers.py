"""Packed layers against dense ones at the shapes of large models: `F.linear`, and for one token a plain loop in C.

Every call finds its weight in memory, not in a cache; packed and dense take turns of a few calls each; the packed
product is compared with the dense one before. Prints a Markdown table: medians, the ratio of dense time to packed
time, and the share of this machine's read bandwidth that the packed weight amounts to. The bandwidth is measured
before and after every row, since that of a shared machine changes, and their mean is taken.

    OMP_NUM_THREADS=2 python benchmarks/layers.py --tokens 1 --isa avx512_bf16
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from optimum_eggs import NMPattern
from optimum_eggs.measure import processor
from optimum_eggs.ops import BACKENDS, INSTRUCTION_SETS, force
from optimum_eggs.speed import read_bandwidth, time_layer

SHAPES = ["4096x4096", "8192x2048", "2048x8192", "11008x4096", "128256x2048"]


def plain_loop(folder: str) -> Callable[[Tensor, Tensor], object]:
    """The dense loop in C beside this file, compiled with gcc."""
    library = Path(folder) / "dense_loop.so"
    source = Path(__file__).with_name("dense_loop.c")
    subprocess.run(["gcc", "-O3", "-fopenmp", "-fPIC", "-shared", source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).dense_loop
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    function.restype = None
    checked = False

    def run(x: Tensor, dense: Tensor) -> None:
        nonlocal checked
        y = torch.empty(len(dense))
        function(dense.data_ptr(), x.data_ptr(), y.data_ptr(), *dense.shape, torch.get_num_threads())
        if not checked:
            exact = x[0].float() @ dense.float().t()
            assert float((y - exact).norm() / exact.norm()) < 1e-5, "the plain loop is wrong"
            checked = True

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backend", choices=BACKENDS, help="force a backend")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="force an instruction set")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each (default: 20)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()

    threads = torch.get_num_threads()
    dtype = getattr(torch, args.dtype)
    isa = args.isa or (INSTRUCTION_SETS[-1] if INSTRUCTION_SETS else "no native kernels")
    print(f"{processor()}, {threads} threads, {isa}, {args.pattern} {args.dtype}\n")
    print("| out x in | tokens | backend | µs | of `F.linear` (middle half) | of the plain loop | of bandwidth, GB/s |")
    print("|---|---:|---|---:|---:|---:|---:|")
    rows = []
    with tempfile.TemporaryDirectory() as folder, force(args.backend, args.isa):
        loop = plain_loop(folder) if args.dtype == "bfloat16" and "avx512_bf16" in INSTRUCTION_SETS else None
        for shape in args.shapes:
            out, inner = map(int, shape.split("x"))
            for tokens in args.tokens:
                others = {"loop": loop} if loop and tokens == 1 else None
                before = read_bandwidth()
                found = time_layer(
                    out, inner, NMPattern.parse(args.pattern), dtype, tokens, args.repeats, others=others
                )
                after = read_bandwidth()
                bandwidth = (before + after) / 2 if before and after else None
                rows.append(asdict(found) | {"read_bandwidth": bandwidth})
                span = f"{found.dense.low / found.packed.high:.2f}-{found.dense.high / found.packed.low:.2f}"
                beside = f"{found.others['loop'].median / found.packed.median:.2f}" if others else ""
                share = f"{found.gigabytes_per_second / bandwidth:.0%} of {bandwidth:.0f}" if bandwidth else ""
                print(
                    f"| {shape} | {tokens} | {found.backend} | {found.packed.median * 1e6:.0f} "
                    f"| {found.ratio:.2f} ({span}) | {beside} | {share} |",
                    flush=True,
                )
    if args.json:
        made = {"processor": processor(), "threads": threads, "torch": torch.__version__}
        args.json.write_text(json.dumps(made | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
