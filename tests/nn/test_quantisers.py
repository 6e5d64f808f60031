"""What quantises linear layers leaves packed ones alone: torch's own, torchao, quanto, bitsandbytes."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import pytest
import tiny
import torch
from torch import nn

from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.nn import CodedEmbedding, CodedLinear


@pytest.fixture
def model():
    """A dense layer, and a packed one behind it."""
    packed = NMLinear.from_linear(nn.Linear(16, 32), NMPattern(2, 4))
    return nn.Sequential(nn.Linear(16, 16), packed)


def test_torch_quantises_the_dense_layers_alone(model):
    packed = model[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        made = torch.ao.quantization.quantize_dynamic(model, inplace=True)
    assert type(made[0]).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear"
    assert made[1] is packed


def test_packed_layers_bear_the_mark_that_torchao_looks_for(model):
    def is_linear(module):  # torchao's default filter, but for weights that are quantised already
        mark = nn.modules.linear.NonDynamicallyQuantizableLinear
        return isinstance(module, nn.Linear) and hasattr(module, "weight") and not isinstance(module, mark)

    assert [is_linear(layer) for layer in model] == [True, False]


def test_torchao_quantises_the_dense_layers_alone(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert type(model[0].weight) is not nn.Parameter
    assert type(model[1].weight) is nn.Parameter
    assert model(torch.ones(1, 16)).shape == (1, 32)


def test_in_the_table_of_quanto_packed_layers_come_first_and_are_left_alone(model, monkeypatch):
    class QLinear:
        @classmethod
        def from_module(cls, module, weights=None):
            return cls()

    quanto = {name: ModuleType(name) for name in ("optimum.quanto", "optimum.quanto.nn.qmodule")}
    table = quanto["optimum.quanto.nn.qmodule"]._QMODULE_TABLE = {nn.Linear: QLinear, nn.LayerNorm: QLinear}
    for name, module in quanto.items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = "optimum_eggs.nn.quanto"
    monkeypatch.setitem(sys.modules, ours, ModuleType(ours))  # what is there now comes back
    for _ in range(2):  # twice is harmless
        del sys.modules[ours]
        importlib.import_module(ours)
    assert list(table) == [NMLinear, CodedLinear, CodedEmbedding, nn.Linear, nn.LayerNorm]

    def quantize_module(module):  # as quanto's
        return next(
            (made.from_module(module, weights="qint8") for kind, made in table.items() if isinstance(module, kind))
        )

    assert isinstance(quantize_module(model[0]), QLinear)
    assert quantize_module(model[1]) is None


def test_quanto_quantises_the_dense_layers_alone(model):
    quanto = pytest.importorskip("optimum.quanto")
    packed = model[1]
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert isinstance(model[0], quanto.QLinear)
    assert model[1] is packed
    assert model(torch.ones(1, 16)).shape == (1, 32)


def test_bitsandbytes_replaces_the_dense_layers_alone():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    model = tiny.make_model("llama")
    block = model.model.layers[0].mlp
    packed = block.up_proj = NMLinear.from_linear(block.up_proj, NMPattern(2, 4))
    replace_with_bnb_linear(model, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert type(block.down_proj).__name__ == "Linear8bitLt"
    assert block.up_proj is packed
