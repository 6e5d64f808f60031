"""Write a dense model and its packed twin, for timing: kept by magnitude, no calibration, so worth nothing but time.

Usage: make_packed.py MODEL OUT [PATTERN], where MODEL is a folder, or `llama-1b` for a random Llama of 16 layers,
hidden size 2048, intermediate size 8192, 8 key-value heads of 64, vocabulary 32,000, tied. Writes OUT/dense and
OUT/packed, in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from optimum_eggs import EGGSConfig, NMLinear
from optimum_eggs.hf.attach import attach_quantizer


def random_llama() -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def main() -> None:
    source, out, pattern = sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or ["2:4"])[0]
    if source == "llama-1b":
        model = random_llama()
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out / "dense")
    config = EGGSConfig(pattern, preset="magnitude")
    config.pruned_modules = {}
    for name, linear in dict(model.named_modules()).items():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NMLinear.from_linear(linear, config.pattern))
            config.pruned_modules[name] = str(config.pattern)
    attach_quantizer(model, config)
    model.save_pretrained(out / "packed")


if __name__ == "__main__":
    main()
