"""Made `v1/`, once. It is never made again: that folder must load for ever.

A random tiny Llama, pruned to 2:4 by magnitude and saved in bfloat16; `expected.safetensors` beside it holds the dense
weights of its packed layers and its logits in float32, as they were then.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.hf.attach import packed_layers

IDS = torch.arange(24).view(2, 12)


def main(folder: Path) -> None:
    """Write the checkpoint and what is expected of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32, max_position_embeddings=32))
    pruner = EGGSPruner(model.eval())
    config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=12)
    pruner.prune(config, calibration=IDS)
    pruner.save_pretrained(folder / "packed", dtype="bfloat16")
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="float32")
    expected = {name: layer.dense_weight().bfloat16() for name, layer in packed_layers(packed).items()}
    with torch.no_grad():
        save_file(expected | {"logits": packed(IDS).logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
