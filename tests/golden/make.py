"""Made `v1/` and `v2/`, once each. They are never made again: those folders must load for ever.

A random tiny Llama, pruned to 2:4 by magnitude and saved in bfloat16; `expected.safetensors` beside it holds the dense
weights of its packed layers and its logits in float32, as they were then. In `v2` the values of its layers are `int4`,
those of one with an odd number of values in a row and of its embeddings `int8`, with a scale for every 64 inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.nn import coded_modules, packed_layers

IDS = torch.arange(24).view(2, 12)


VERSIONS = {
    "v1": ({"intermediate_size": 36}, EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=12)),
    "v2": (
        {"intermediate_size": 136, "tie_word_embeddings": True},
        EGGSConfig(
            "1:4",
            preset="magnitude",
            num_samples=2,
            seq_len=12,
            values="int4",
            value_group=64,
            rounding="nearest",
            head="int8",
        ),
    ),
}


def main(folder: Path, version: str) -> None:
    """Write the checkpoint and what is expected of it."""
    torch.manual_seed(0)
    sizes, config = VERSIONS[version]
    sizes = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, **sizes}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32, max_position_embeddings=32))
    pruner = EGGSPruner(model.eval())
    pruner.prune(config, calibration=IDS)
    pruner.save_pretrained(folder / "packed", dtype="bfloat16")
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="float32")
    expected = {
        name: layer.dense_weight() for name, layer in {**packed_layers(packed), **coded_modules(packed)}.items()
    }
    if version == "v1":
        expected = {name: weight.bfloat16() for name, weight in expected.items()}
    with torch.no_grad():
        save_file(expected | {"logits": packed(IDS).logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
