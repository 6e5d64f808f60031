"""One token through layers of the same inputs: a call for each, and one call for all, as compiled generation makes it.

python benchmarks/joined.py

Weights are read from memory, not from the cache: as many copies of the layers as fill a gigabyte take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.measure import processor
from optimum_eggs.speed.timing import alternate

SHAPES = {
    "SmolLM2-135M: q, k, v": (576, (576, 192, 192)),
    "SmolLM2-135M: gate, up": (576, (1536, 1536)),
    "Qwen2.5-1.5B: q, k, v": (1536, (1536, 256, 256)),
    "Qwen2.5-1.5B: gate, up": (1536, (8960, 8960)),
}
BYTES = 1 << 30
NUMBERS = (2, 4, 0, 0)


@torch.no_grad()
def main() -> None:
    print(f"{processor()}, {torch.get_num_threads()} threads, 2:4 in bfloat16, one token; µs")
    for name, (columns, rows) in SHAPES.items():
        dense = torch.nn.Linear(columns, sum(rows), bias=False).bfloat16()
        packed = NMLinear.from_linear(dense, NMPattern(2, 4))
        weight, bits = packed.weight.detach(), packed.weight_meta
        count = BYTES // (weight.nbytes + bits.nbytes)
        copies = [(weight.clone().split(rows), bits.clone().split(rows)) for _ in range(count)]
        x = torch.randn(1, 1, columns).bfloat16()
        turns = [itertools.cycle(copies), itertools.cycle(copies)]

        def apart(x: torch.Tensor = x, turn: Iterator = turns[0]) -> list[torch.Tensor]:
            return [call(x, *layer) for layer in zip(*next(turn), strict=True)]

        def joint(x: torch.Tensor = x, turn: Iterator = turns[1]) -> torch.Tensor:
            return call_all(x, *next(turn))

        torch.testing.assert_close(torch.cat(apart(), -1), joint(), rtol=2e-2, atol=2e-2)
        one, all_ = alternate([apart, joint], 9, count)
        low, median, high = (1e6 * each for each in (all_.low, all_.median, all_.high))
        ratio = one.median / all_.median
        print(f"{name:24} apart {1e6 * one.median:6.1f}   joint {median:6.1f} ({low:.1f}-{high:.1f})   {ratio:.2f} x")


def call(x: torch.Tensor, weight: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return torch.ops.optimum_eggs.packed_linear(x, weight, None, bits, None, *NUMBERS)


def call_all(x: torch.Tensor, weights: tuple[torch.Tensor, ...], bits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    third = (None,) * (3 - len(weights))
    nothing = (None,) * 3
    return torch.ops.optimum_eggs.packed_linears(x, *weights, *third, *nothing, *bits, *third, *nothing, *NUMBERS)


if __name__ == "__main__":
    main()
