"""Tiny, randomly initialised models of every architecture shown, a tokenizer and a text for them."""

from __future__ import annotations

import json
import random

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 256
_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _SMALL | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS = {
    "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama-untied": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**_LLAMA, head_dim=8)),
    "gemma3": lambda: (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "mistral": lambda: (t.MistralForCausalLM, t.MistralConfig(**_LLAMA, sliding_window=8)),
    "opt": lambda: (
        t.OPTForCausalLM,
        t.OPTConfig(
            **_SMALL,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=16,
        ),
    ),
    "gpt2": lambda: (t.GPT2LMHeadModel, t.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "gpt_neox": lambda: (
        t.GPTNeoXForCausalLM,
        t.GPTNeoXConfig(
            **_SMALL,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
    ),
    "phi3": lambda: (t.Phi3ForCausalLM, t.Phi3Config(**_LLAMA)),
    "bert": lambda: (
        t.BertForMaskedLM,
        t.BertConfig(
            **_SMALL,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
    ),
    "mixtral": lambda: (t.MixtralForCausalLM, t.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: (
        t.GptOssForCausalLM,
        t.GptOssConfig(
            **_LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "qwen3_moe": lambda: (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**_LLAMA, **_MOE, head_dim=8)),
}


def make_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    """A tiny model with random weights."""
    kind, config = CONFIGS[name]()
    torch.manual_seed(seed)
    return kind._from_config(config, dtype=dtype).eval()  # keeps rotary tables in float32, as loading does


def make_text(words: int = 3000, seed: int = 0) -> str:
    """A text of random words."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return " ".join(draw.choice(known) for _ in range(words))


def make_tokenizer() -> t.PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on that text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([make_text(500)], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_windows(count: int = 8, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token windows (count, length)."""
    return torch.randint(4, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def flip_a_bit(file, tensor="model.layers.0.mlp.up_proj.weight"):
    """Flip the lowest bit of a tensor's first value in a safetensors file."""
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + json.loads(data[8:begin])[tensor]["data_offsets"][0]] ^= 1
    file.write_bytes(data)
