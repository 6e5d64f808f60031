import pytest
import torch
from torch import nn

from optimum_eggs.engine import precision
from optimum_eggs.engine.precision import bfloat16_products


@pytest.fixture
def has_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda device: True)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))


def test_linear_layers_alone_multiply_in_bfloat16(block, has_bfloat16):
    x, inner = torch.randn(5, 64), torch.randn(5, 32)
    exact, normed = block[0](x), block[1](inner)
    with torch.no_grad(), bfloat16_products(block):
        rough = block[0](x)
        by_name = block[0](input=x)
        assert torch.equal(block[1](inner), normed)
    assert rough.dtype == torch.float32
    assert torch.equal(rough, by_name)
    assert 1e-4 < float((rough - exact.detach()).norm() / exact.detach().norm()) < 1e-2
    assert torch.equal(block[0](x), exact)


def test_gradients_are_in_the_dtype_of_the_weights(block, has_bfloat16):
    x = torch.randn(5, 64)
    exact = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    with bfloat16_products(block):
        rough = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 2e-2


def test_layers_are_as_they_were_afterwards(block, has_bfloat16):
    own = block[2].forward
    block[2].forward = hooked = lambda x: own(x) + 1  # as tools that wrap a layer leave it
    with pytest.raises(RuntimeError, match="shapes"), bfloat16_products(block):
        block(torch.zeros(1, 3))
    assert "forward" not in vars(block[0])
    assert vars(block[2])["forward"] is hooked


def test_without_the_instructions_nothing_changes(block, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda device: False)
    x = torch.randn(5, 64)
    exact = block(x)
    with bfloat16_products(block):
        assert torch.equal(block(x), exact)
