"""Arguments of the operations that multiply by stored layers."""

import pytest
import torch
from oracles import gaussian

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.nn import CodedLinear
from optimum_eggs.ops import without_kernels
from optimum_eggs.packing.codes import Coding
from optimum_eggs.update.rounding import nearest

OP = torch.ops.optimum_eggs.packed_linear
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
has_kernels = pytest.mark.skipif(without_kernels is not None, reason=f"{without_kernels}")
CASES = ["packed", "int8", "int4", "dense"]


def arguments(case, columns=192, rows=33, dtype=torch.float32, bias=True):
    """All but the input."""
    dense = torch.nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)
    dense.weight.data = gaussian(rows, columns, dtype=dtype)
    if case == "dense":
        return dense.weight, None, None, dense.bias, 1, 1, 0, 0
    packed = NMLinear.from_linear(dense, NMPattern(2, 4))
    if case == "packed":
        return packed.weight, None, packed.weight_meta, packed.bias, 2, 4, 0, 0
    coding = Coding(case, 64)
    codes, scale = nearest(packed.dense_weight().float(), coding)
    codes = codes[packed.mask()].view(rows, -1)
    layer = CodedLinear.from_codes(packed, codes, scale, coding)
    return layer.weight, layer.weight_scale, layer.weight_meta, layer.bias, 2, 4, coding.bits, 64
