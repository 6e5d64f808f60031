"""Dense weights of 16 bits, by the kernels that read them for few tokens."""

import pytest
import torch
from oracles import gaussian
from torch import nn

from optimum_eggs.nn.dense import DenseLinear, is_dense_linear, read_fast
from optimum_eggs.ops import INSTRUCTION_SETS, force, native
from optimum_eggs.ops.dense_linear import dense_linear
from optimum_eggs.ops.select import dense_kernel

CPU = torch.device("cpu")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernels_multiply_dense_weights(isa, dtype, tolerance):
    for tokens in (1, 2, 5, 8, 24):
        for rows, columns in ((1, 64), (17, 200), (130, 33), (5, 3)):
            x, weight = gaussian(tokens, columns, dtype=dtype), gaussian(rows, columns, dtype=dtype, seed=1)
            bias = gaussian(rows, dtype=dtype, seed=2) if tokens % 2 else None
            expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            found = native.linear(isa, x, weight, None, bias, 1, 1)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("avx512_bf16" not in INSTRUCTION_SETS, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("tokens", [1, 24, 25])
def test_a_kernel_runs_where_it_is_faster(tokens, monkeypatch):
    calls = []
    linear = native.linear
    monkeypatch.setattr(native, "linear", lambda *args: calls.append(args) or linear(*args))
    x, weight = gaussian(tokens, 64, dtype=torch.bfloat16), gaussian(30, 64, dtype=torch.bfloat16, seed=1)
    with force(isa="avx512_bf16"):
        found = dense_linear(x, weight, None)
    assert len(calls) == (tokens < 25)
    torch.testing.assert_close(found, nn.functional.linear(x, weight), rtol=1e-2, atol=1e-2)


def test_torch_multiplies_all_else():
    assert dense_kernel(torch.float32, CPU, 1) is None
    assert dense_kernel(torch.bfloat16, torch.device("cuda"), 1) is None
    with force("reference"):
        assert dense_kernel(torch.bfloat16, CPU, 1) is None
    x, weight = gaussian(3, 64, dtype=torch.bfloat16), gaussian(30, 64, dtype=torch.bfloat16, seed=1)
    x.requires_grad_()
    dense_linear(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64), rtol=1e-2, atol=1e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert dense_linear(gaussian(3, 64), weight.float(), None).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        dense_linear(gaussian(3, 32, dtype=torch.bfloat16), weight, None)
    with pytest.raises(RuntimeError, match="same dtype"):
        dense_linear(gaussian(3, 64), weight, None)
    assert dense_linear(x[:0].detach(), weight, None).shape == (0, 30)


def test_compiled_code_is_that_of_torch():
    layer = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    plain = layer(gaussian(3, 64, dtype=torch.bfloat16))
    read_fast(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (3, 5, 40):
        x = gaussian(tokens, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(gaussian(3, 64, dtype=torch.bfloat16)), plain, rtol=1e-2, atol=1e-2)


def test_layers_are_made_fast_and_what_they_were():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.ReLU())
    read_fast(model)
    assert [type(module) for module in model] == [DenseLinear, Own, nn.ReLU]
    assert [is_dense_linear(module) for module in model] == [True, False, False]
    read_fast(model, fast=False)
    assert [type(module) for module in model] == [nn.Linear, Own, nn.ReLU]
