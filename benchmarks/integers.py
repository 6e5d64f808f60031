"""Layers of integers against packed and dense bfloat16, by torch and by the kernel, at the shapes of large models.

Every call finds its weight in memory, not in a cache; all take turns of a few calls each; before, each product is
compared with that of its values, within the bound that is stated of rounded inputs. Prints a Markdown table: medians,
the ratio of the time of packed bfloat16 (middle half), and the share of the machine's read bandwidth that the weight
amounts to. The bandwidth is the median of plain reading that takes its turn with the products, since a shared machine's
memory changes its speed; in huge pages, which the weights are not in.

    OMP_NUM_THREADS=2 python benchmarks/integers.py --tokens 1
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_eggs import NMPattern
from optimum_eggs.masks import topn_mask
from optimum_eggs.measure import processor
from optimum_eggs.ops import INSTRUCTION_SETS, force, nm_linear
from optimum_eggs.ops.coded_linear import coded_linear, values_of
from optimum_eggs.ops.dense_linear import dense_linear
from optimum_eggs.packing import pack
from optimum_eggs.packing.codes import Coding, store_codes
from optimum_eggs.speed.layers import reading
from optimum_eggs.speed.timing import alternate
from optimum_eggs.update.rounding import nearest

SHAPES = ["4096x4096", "8192x2048", "2048x8192", "11008x4096", "128256x2048"]
WORKING_SET = 1 << 29  # bytes of dense bfloat16 to go through
CALLS = 8  # in a turn


def through(products: list[Callable[[], object]]) -> Callable[[], object]:
    """The next of the products, at every call."""
    turn = itertools.cycle(products)
    return lambda: next(turn)()


def product(x: Tensor, weight: tuple[Tensor, ...], pattern: NMPattern) -> Tensor:
    """With a packed weight of floats."""
    return nm_linear(x, weight[0], weight[1], None, pattern.n, pattern.m)


def coded_product(x: Tensor, weight: tuple[Any, ...], rest: tuple[int, int, str, int]) -> Tensor:
    """With a weight of integers."""
    codes, scale, meta = weight
    n, m, kind, group = rest
    return coded_linear(x, codes, scale, meta, None, n, m, kind, group)


def check(y: Tensor, x: Tensor, values: Tensor, mask: Tensor, group: int) -> None:
    """Raise unless y is within the bound of the product with the values: 1/254 of Σ|w|·max|x|, and rounding to y."""
    dense = torch.zeros(mask.shape).masked_scatter(mask, values)
    exact = x.float() @ dense.t()
    columns = x.shape[1]
    largest = torch.nn.functional.pad(x.float().abs(), (0, -columns % group)).unflatten(1, (-1, group)).amax(2)
    size = torch.nn.functional.pad(dense.abs(), (0, -columns % group)).unflatten(1, (-1, group)).sum(2)
    bound = largest @ size.t() / 254 + exact.abs() / 128 + 1e-3
    assert bool(((y.float() - exact).abs() <= bound).all()), "the product with integers is beyond its bound"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="force an instruction set")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    threads, pattern = torch.get_num_threads(), NMPattern.parse(args.pattern)
    print(f"{processor()}, {threads} threads, {args.isa or INSTRUCTION_SETS[-1]}, {pattern}, {args.group} a scale\n")
    print("| out x in | tokens | weight | bits | µs | of packed bfloat16 | of bandwidth, GB/s |")
    print("|---|---:|---|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    with force("native" if args.isa else None, args.isa), torch.no_grad():
        for shape in args.shapes:
            out, inner = map(int, shape.split("x"))
            for row in measured(out, inner, pattern, args):
                rows.append(row)
                share = f"{row['gigabytes_per_second'] / row['read_bandwidth']:.0%} of {row['read_bandwidth']:.0f}"
                print(
                    f"| {shape} | {row['tokens']} | {row['weight']} | {row['bits']:.2f} | {row['seconds'] * 1e6:.0f} "
                    f"| {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}) | {share} |",
                    flush=True,
                )
    if args.json:
        made = {"processor": processor(), "threads": threads, "torch": torch.__version__}
        args.json.write_text(json.dumps(made | {"rows": rows}, indent=1) + "\n")


def measured(out: int, inner: int, pattern: NMPattern, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one shape."""
    draw = torch.Generator().manual_seed(0)
    copies = max(2, WORKING_SET // (2 * out * inner))
    weight = torch.randn(out, inner, generator=draw) * inner**-0.5
    mask = topn_mask(weight.abs(), pattern)
    every = torch.ones_like(mask)
    floats = pack(weight.bfloat16(), mask, pattern)
    stored: dict[str, tuple[Any, ...]] = {}
    for name, kind, kept in (("int8", "int8", mask), ("int4", "int4", mask), ("dense int8", "int8", every)):
        coding = Coding(kind, args.group)
        codes, scale = nearest(weight * kept, coding)
        meta = floats[1] if kept is mask else None
        stored[name] = store_codes(codes[kept].view(out, -1), coding), scale, meta, kind, kept
    dense = [(weight * mask).bfloat16() for _ in range(copies)]
    packed = [tuple(part.clone() for part in floats) for _ in range(copies)]
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, inner, generator=draw).bfloat16()
        products = {
            "packed bfloat16": through([partial(product, x, w, pattern) for w in packed]),
            "dense bfloat16": through([partial(torch.nn.functional.linear, x, w) for w in dense]),
            "dense bfloat16, by our kernel": through([partial(dense_linear, x, w, None) for w in dense]),
        }
        expected = x.float() @ dense[0].float().t()
        assert torch.allclose(dense_linear(x, dense[0], None).float(), expected, 1e-2, 1e-2)
        nbytes = {"packed bfloat16": sum(part.nbytes for part in floats), "dense bfloat16": dense[0].nbytes}
        nbytes["dense bfloat16, by our kernel"] = dense[0].nbytes
        for name, (codes, scale, meta, kind, kept) in stored.items():
            n, m = (pattern.n, pattern.m) if meta is not None else (1, 1)
            rest = n, m, kind, args.group
            values = values_of(codes, scale, inner, n, m, kind, args.group, torch.float32)
            check(coded_linear(x, codes, scale, meta, None, n, m, kind, args.group), x, values, kept, args.group)
            parts = [(codes.clone(), scale.clone(), None if meta is None else meta.clone()) for _ in range(copies)]
            products[name] = through([partial(coded_product, x, part, rest) for part in parts])
            nbytes[name] = codes.nbytes + scale.nbytes + (0 if meta is None else meta.nbytes)
        products["reading"] = reading(WORKING_SET)
        found = dict(zip(products, alternate(list(products.values()), args.repeats, CALLS), strict=True))
        bandwidth = WORKING_SET / found.pop("reading").median / 1e9
        base = found["packed bfloat16"]
        for name, seconds in found.items():
            rows.append(
                {
                    "out": out,
                    "in": inner,
                    "tokens": tokens,
                    "weight": name,
                    "bits": 8 * nbytes[name] / (out * inner),
                    "seconds": seconds.median,
                    "ratio": base.median / seconds.median,
                    "low": base.low / seconds.high,
                    "high": base.high / seconds.low,
                    "gigabytes_per_second": nbytes[name] / seconds.median / 1e9,
                    "read_bandwidth": bandwidth,
                }
            )
    return rows


if __name__ == "__main__":
    main()
