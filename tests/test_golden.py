"""Every version of the packed format must load for ever, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_eggs import NMPattern
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import coded_modules, packed_layers
from optimum_eggs.packing import pack, unpack

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(24).view(2, 12)
versions = pytest.mark.parametrize("version", ["v1", "v2"])


@versions
def test_the_weights_are_the_same_to_the_bit(version):
    expected = load_file(GOLDEN / version / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / version / "packed")
    modules = {**packed_layers(model), **coded_modules(model)}
    assert modules.keys() == expected.keys() - {"logits"}
    for name, module in modules.items():
        assert torch.equal(module.dense_weight(), expected[name])


@versions
def test_the_logits_are_the_same(version):
    expected = load_file(GOLDEN / version / "expected.safetensors")["logits"]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / version / "packed", dtype="float32")
    with torch.no_grad():
        # another processor may sum in another order, so not to the bit
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@versions
def test_inspection_finds_nothing_wrong(version):
    found = inspect_checkpoint(GOLDEN / version / "packed")
    assert found.ok
    assert len(found.layers) == {"v1": 14, "v2": 10}[version]
    assert found.config["format_version"] == int(version[1:])


def test_the_integers_are_those_of_the_specification():
    # docs/format.md, read by hand from the bytes of the files.
    stored = load_file(GOLDEN / "v2" / "packed" / "model.safetensors")
    expected = load_file(GOLDEN / "v2" / "expected.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes, scale, meta = (stored[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_meta"))
    assert (codes.dtype, scale.dtype, meta.dtype) == (torch.uint8, torch.bfloat16, torch.uint8)
    assert (codes.shape, scale.shape, meta.shape) == ((20, 17), (20, 3), (20, 17))
    for row in (0, 7, 19):
        at = 0
        for column in range(136):
            value = 0.0
            if meta[row, column // 8] >> column % 8 & 1:
                code = int(codes[row, at // 2]) >> 4 * (at % 2) & 15
                value = (code - 8) * float(scale[row, column // 64])
                at += 1
            assert float(expected[name][row, column]) == value
        assert at == 34


@pytest.mark.parametrize(
    ("pattern", "kept", "bits"),
    [
        ("2:4", [0, 3, 5, 6, 8, 9], [0b01101001, 0b00000011]),
        ("1:4", [2, 4, 11], [0b00010100, 0b00001000]),
        ("3:4", [0, 1, 3, 4, 5, 6, 9, 10, 11], [0b01111011, 0b00001110]),
    ],
)
def test_the_layout_bit_by_bit(pattern, kept, bits):
    # The example of docs/format.md: a row of 12 inputs, whose bits are padded to two bytes.
    weight = torch.arange(12.0)[None] + 1
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, kept] = True
    values, meta = pack(weight, mask, NMPattern.parse(pattern))
    assert values.tolist() == [[index + 1.0 for index in kept]]
    assert meta.tolist() == [bits]
    assert torch.equal(unpack(values, meta, NMPattern.parse(pattern)), weight * mask)
