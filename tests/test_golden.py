"""Version 1 of the packed format must load for ever, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_eggs import NMPattern
from optimum_eggs.hf.attach import packed_layers
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.packing import pack, unpack

GOLDEN = Path(__file__).parent / "golden" / "v1"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
IDS = torch.arange(24).view(2, 12)


def test_the_weights_are_the_same_to_the_bit():
    layers = packed_layers(AutoModelForCausalLM.from_pretrained(GOLDEN / "packed"))
    assert layers.keys() == EXPECTED.keys() - {"logits"}
    for name, layer in layers.items():
        assert torch.equal(layer.dense_weight(), EXPECTED[name])


def test_the_logits_are_the_same():
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "packed", dtype="float32")
    with torch.no_grad():
        # another processor may sum in another order, so not to the bit
        torch.testing.assert_close(model(IDS).logits, EXPECTED["logits"], rtol=1e-4, atol=1e-5)


def test_inspection_finds_nothing_wrong():
    found = inspect_checkpoint(GOLDEN / "packed")
    assert found.ok
    assert len(found.layers) == 14


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
