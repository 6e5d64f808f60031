"""What one call of a layer costs besides its arithmetic: a packed and a dense layer too small to matter, one token.

python benchmarks/call_cost.py
"""

from __future__ import annotations

import torch

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.measure import processor
from optimum_eggs.speed.timing import alternate

CALLS = 2000


@torch.no_grad()
def main() -> None:
    dense = torch.nn.Linear(64, 64, bias=False).bfloat16()
    packed = NMLinear.from_linear(dense, NMPattern(2, 4))
    x = torch.randn(1, 1, 64).bfloat16()

    def many(layer: torch.nn.Module) -> None:
        for _ in range(CALLS):
            layer(x)

    found = alternate([lambda: many(packed), lambda: many(dense)], 9)
    print(f"{processor()}, {torch.get_num_threads()} threads, 64 x 64 in bfloat16, one token")
    for name, seconds in zip(("NMLinear", "nn.Linear"), found, strict=True):
        low, median, high = (1e6 * value / CALLS for value in (seconds.low, seconds.median, seconds.high))
        print(f"{name:>10} {median:6.2f} µs ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
