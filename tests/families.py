"""Every family of models that is shown to work, as tiny random models; printed, the table of `docs/architectures.md`.

python tests/families.py
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers as t

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.engine.report import PruneReport

_PLAIN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = tiny._LLAMA
_HEADS = _LLAMA | {"head_dim": 8}
_GPT = tiny._SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_SHARED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_ENCODER = tiny._SMALL | _PLAIN
_HALVES = {
    f"{half}_{key}": value
    for half in ("encoder", "decoder")
    for key, value in {"layers": 2, "ffn_dim": 64, "attention_heads": 4}.items()
}
_EYE = _PLAIN | {"image_size": 16, "patch_size": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_QWEN_EYE = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_QWEN_TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}


@dataclass(frozen=True)
class Family:
    """A model of transformers, made tiny: its class, that of its configuration, and what those are to be told."""

    kind: str
    model: str
    config: str
    values: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> str | None:
        """What this version of transformers lacks of it."""
        return next((name for name in (self.model, self.config) if not hasattr(t, name)), None)

    def make(self) -> t.PreTrainedModel:
        """The model, with random weights."""
        torch.manual_seed(0)
        return getattr(t, self.model)(getattr(t, self.config)(**self.values)).eval()


def _decoder(name: str, values: dict[str, Any], kind: str = "decoder", **options: Any) -> Family:
    return Family(kind, f"{name}ForCausalLM", f"{name}Config", values, options)


def _encoder(name: str, values: dict[str, Any], task: str = "MaskedLM") -> Family:
    return Family("encoder", f"{name}For{task}", f"{name}Config", values)


def _sees(name: str, text: dict[str, Any], vision: dict[str, Any], more: dict[str, Any], **options: Any) -> Family:
    values = {"text_config": text, "vision_config": vision, "pad_token_id": 0} | more
    return Family("text and images", f"{name}ForConditionalGeneration", f"{name}Config", values, options)


def _half(name: str, values: dict[str, Any], block_list: str) -> Family:
    options = {"block_list": block_list}
    return Family("encoder-decoder", f"{name}ForConditionalGeneration", f"{name}Config", values, options)


FAMILIES = [
    _decoder("Llama", _LLAMA),
    _decoder("Mistral", _LLAMA | {"sliding_window": 8}),
    _decoder("Qwen2", _LLAMA),
    _decoder("Qwen3", _HEADS),
    _decoder("Gemma", _HEADS),
    _decoder("Gemma2", _HEADS | {"sliding_window": 8}),
    Family("decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS | _SLIDING),
    _decoder("Phi", _LLAMA),
    _decoder("Phi3", _LLAMA),
    _decoder("OPT", tiny._SMALL | {k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | {"ffn_dim": 64}),
    Family("decoder", "GPT2LMHeadModel", "GPT2Config", _GPT),
    _decoder("GPTNeoX", _ENCODER),
    _decoder(
        "GPTNeo",
        tiny._SMALL
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    _decoder("GPTJ", _GPT | {"rotary_dim": 4}),
    _decoder("GPTBigCode", _GPT),
    _decoder("CodeGen", _GPT | {"rotary_dim": 4}),
    _decoder("Bloom", tiny._SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    _decoder("Mpt", tiny._SMALL | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    _decoder("Falcon", tiny._SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    _decoder("Olmo2", _LLAMA),
    _decoder("Olmo3", _LLAMA),
    _decoder("Granite", _LLAMA),
    _decoder("Cohere", _LLAMA),
    _decoder("Cohere2", _LLAMA | {"sliding_window": 8}),
    _decoder("Starcoder2", _LLAMA),
    _decoder("StableLm", _LLAMA),
    _decoder("Glm", _HEADS),
    _decoder("Glm4", _HEADS),
    _decoder("SmolLM3", _LLAMA),
    _decoder("Nemotron", _HEADS),
    _decoder("Exaone4", _LLAMA),
    _decoder("SeedOss", _HEADS),
    _decoder("Ernie4_5", _HEADS),
    _decoder("Mixtral", _LLAMA | _MIXTURE, "mixture of experts"),
    _decoder("Qwen2Moe", _LLAMA | _SHARED, "mixture of experts"),
    _decoder("Qwen3Moe", _HEADS | tiny._MOE, "mixture of experts"),
    _decoder("Olmoe", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    _decoder("GraniteMoe", _LLAMA | _MIXTURE, "mixture of experts"),
    _decoder("Phimoe", _LLAMA | _MIXTURE, "mixture of experts"),
    _decoder(
        "GptOss",
        _HEADS | _MIXTURE | _SLIDING | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "mixture of experts",
    ),
    _decoder("Glm4Moe", _HEADS | _ROUTED | {"n_group": 1, "topk_group": 1}, "mixture of experts"),
    _decoder(
        "DeepseekV3",
        _LLAMA
        | _ROUTED
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        "mixture of experts",
    ),
    Family(
        "mixture of experts",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _HEADS | {"intermediate_size_mlp": 64} | {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]},
    ),
    _decoder(
        "Qwen3Next",
        _HEADS
        | _SHARED
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
        "state space, or in part",
    ),
    _decoder(
        "Mamba",
        {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8} | {"time_step_rank": 8},
        "state space, or in part",
    ),
    _decoder(
        "Mamba2",
        {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8}
        | {"head_dim": 8, "n_groups": 1, "chunk_size": 8},
        "state space, or in part",
    ),
    _decoder(
        "Jamba",
        _LLAMA
        | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2}
        | {"attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8},
        "state space, or in part",
    ),
    _decoder("FalconH1", _LLAMA | _MAMBA | {"mamba_d_ssm": 64, "mamba_chunk_size": 8}, "state space, or in part"),
    _decoder(
        "GraniteMoeHybrid",
        _LLAMA
        | _MAMBA
        | {"num_local_experts": 0, "shared_intermediate_size": 64}
        | {"layer_types": ["mamba", "attention"], "mamba_chunk_size": 8},
        "state space, or in part",
    ),
    _decoder(
        "Lfm2",
        _LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "state space, or in part",
    ),
    _decoder("Rwkv", {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}, "state space, or in part"),
    _encoder("Bert", _ENCODER),
    _encoder("Bert", _ENCODER, "SequenceClassification"),
    _encoder("Roberta", _ENCODER | {"max_position_embeddings": 130}),
    _encoder("DistilBert", {"vocab_size": 256, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    _encoder("Electra", _ENCODER | {"embedding_size": 32}),
    _encoder("ModernBert", _ENCODER | {"cls_token_id": 1, "sep_token_id": 2}),
    _encoder(
        "DebertaV2",
        {"vocab_size": 256}
        | _PLAIN
        | {"relative_attention": True, "position_biased_input": False}
        | {"pos_att_type": ["p2c", "c2p"]},
    ),
    _half(
        "T5",
        {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        "decoder.block",
    ),
    _half(
        "Bart",
        tiny._SMALL
        | _HALVES
        | {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}
        | {"forced_eos_token_id": None},
        "model.decoder.layers",
    ),
    _sees(
        "Llava",
        {"model_type": "llama"} | _LLAMA,
        {"model_type": "clip_vision_model"} | _EYE | {"projection_dim": 32},
        {"image_token_index": 255, "vision_feature_layer": -1},
    ),
    _sees(
        "Qwen2_5_VL", _LLAMA | _SECTIONS, _QWEN_EYE | {"fullatt_block_indexes": [1], "window_size": 16}, _QWEN_TOKENS
    ),
    _sees(
        "Qwen3VL",
        _HEADS | _SECTIONS,
        _QWEN_EYE | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        _QWEN_TOKENS,
    ),
    _sees("Gemma3", _HEADS | _SLIDING, _EYE, {"mm_tokens_per_image": 4, "image_token_index": 255}),
    _sees("SmolVLM", {"model_type": "llama"} | _LLAMA, _EYE, {"image_token_id": 255, "scale_factor": 2}),
    _sees("Idefics3", {"model_type": "llama"} | _LLAMA, _EYE, {"image_token_id": 255, "scale_factor": 2}),
    _sees(
        "Mistral3",
        {"model_type": "mistral"} | _LLAMA,
        {"model_type": "pixtral", "head_dim": 8} | _EYE,
        {"image_token_index": 255, "spatial_merge_size": 2, "vision_feature_layer": -1},
    ),
    _sees("InternVL", {"model_type": "qwen2"} | _LLAMA, _EYE, {"image_token_id": 255}),
    _sees(
        "PaliGemma",
        {"model_type": "gemma"} | _HEADS,
        {"model_type": "siglip_vision_model", "projection_dim": 32} | _EYE,
        {"image_token_index": 255, "projection_dim": 32},
        block_list="model.language_model.layers",
    ),
]
BY_NAME = {family.model: family for family in FAMILIES}


def config(family: Family) -> EGGSConfig:
    """How it is pruned here."""
    windows = tiny.make_windows(4, 16) % 200  # no tokens that stand for images
    return EGGSConfig("2:4", num_samples=4, seq_len=16, batch_size=2, band=8, calibration=windows, **family.options)


def row(family: Family, report: PruneReport) -> str:
    """Its row of the table."""
    said = ", ".join(f"`{key}={value!r}`" for key, value in family.options.items())
    return f"| {family.kind} | `{family.model}` | {len(report.layers)} | {left_dense(report)} | {said} |"


def left_dense(report: PruneReport) -> str:
    """What is left dense but embeddings and heads, briefly: whole towers, or kinds of layers."""
    blocks = report.layers[0].name.split(".0.")[0]
    parts: dict[str, None] = {}
    for layer in report.left_dense:
        name = re.sub(r"\.weight$", "", layer.name)
        if name in ("lm_head", "head", "decoder", "generator_lm_head") or (
            "mbedding" in layer.reason and name.startswith(blocks.rpartition(".")[0])
        ):
            continue
        inside = re.match(rf"{re.escape(blocks)}\.\d+\.(.*)", name)
        parts[inside[1] if inside else _tower(name, blocks)] = None
    return ", ".join(f"`{part}`" for part in parts)


def _tower(name: str, blocks: str) -> str:
    """The first part of a name that the blocks do not share."""
    parts = name.split(".")
    while len(parts) > 1 and blocks.startswith(parts[0]):
        blocks = blocks.removeprefix(parts.pop(0)).lstrip(".")
    return parts[0]


def table() -> str:
    """All rows."""
    lines = [
        "| kind | class | layers pruned, of two blocks | left dense, besides embeddings and head | told |",
        "|---|---|---:|---|---|",
    ]
    for family in FAMILIES:
        if family.missing() is None:
            pruner = EGGSPruner(family.make())
            lines.append(row(family, pruner.prune(config(family), progress=False)))
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    t.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(table())
