"""Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1."""

import torch

from optimum_eggs.masks import topn_mask
from optimum_eggs.ops.triton import linear
from optimum_eggs.packing import pack
from optimum_eggs.pattern import NMPattern

# Largest relative error of the conversion to each dtype: half a unit, but a whole one for bfloat16, which the
# interpreter (not the compiler) cuts off instead of rounding.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def main():
    count = 0
    for pattern in (NMPattern(2, 4), NMPattern(1, 4), NMPattern(6, 8), NMPattern(5, 16), NMPattern(17, 32)):
        for rows, groups in ((1, 1), (17, 9), (40, 160 // pattern.m + 1)):
            for dtype, unit in UNIT.items():
                for tokens in (1, 3):
                    generator = torch.Generator().manual_seed(count)
                    weight = torch.randn(rows, groups * pattern.m, generator=generator).to(dtype)
                    mask = topn_mask(torch.rand(weight.shape, generator=generator), pattern)
                    values, meta = pack(weight, mask, pattern)
                    x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
                    bias = torch.randn(rows, generator=generator).to(dtype) if tokens == 1 else None
                    y = linear(x, values, meta, bias, pattern.n, pattern.m).double()
                    dense = (weight * mask).double()
                    exact = x.double() @ dense.t() + (0 if bias is None else bias.double())
                    size = x.double().abs() @ dense.abs().t() + (0 if bias is None else bias.double().abs())
                    bound = (values.shape[1] + 1) * 2.0**-24 * size + unit * exact.abs() + 1e-7
                    assert bool(((y - exact).abs() <= bound).all()), (pattern, rows, groups, dtype, tokens)
                    count += 1
    print(count)


if __name__ == "__main__":
    main()
