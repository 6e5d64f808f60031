"""LoRA on packed models of which a part is offloaded: what it computes and trains is what it does in memory."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers

peft = pytest.importorskip("peft")
from accelerate import cpu_offload  # noqa: E402

IDS = tiny.make_windows(2, 12)
PLACES = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
PLACES |= {"model.layers.1": "disk"}


def adapted(folder, offload=None, dtype="float32", offload_buffers=False, **options):
    places = {"device_map": PLACES, "offload_folder": offload, "offload_buffers": offload_buffers} if offload else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **places)
    assert bool(offload) == any(layer.weight.is_meta for layer in packed_layers(model).values())
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**config | options)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 1e-9}, {"dtype": "bfloat16"}, {"offload_buffers": True}, {"target_modules": ["q_proj"]}],
    ids=str,
)
def test_gradients_are_those_in_memory(options, checkpointing, packed_folder, tmp_path):
    found = []
    for offload in (None, tmp_path):
        model = adapted(packed_folder, offload, **options)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        found.append(gradients(model))
    inside, outside = found
    assert inside.keys() == outside.keys()
    assert len(inside) == (4 if "target_modules" in options else 28)
    assert all(grad.any() and torch.equal(grad, outside[name]) for name, grad in inside.items())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_it_merges_unmerges_and_is_saved(offload_buffers, packed_folder, tmp_path):
    expected = logits(adapted(packed_folder))
    model = adapted(packed_folder, tmp_path, offload_buffers=offload_buffers)
    torch.testing.assert_close(logits(model), expected)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert not layer.get_delta_weight("default").is_meta
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(packed_folder)))
    model.save_pretrained(tmp_path / "adapter")
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(whole), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_may_be_offloaded_with_its_layer(dropout, offload_buffers, packed_folder):
    model = adapted(packed_folder, lora_dropout=dropout)
    expected = logits(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_dense_layer_of_a_packed_model_is_trained_too(tokenizer, tmp_path):
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=16, ignore=["o_proj", "lm_head"])
    pruner.prune(config, calibration=tiny.make_windows(2, 16))
    pruner.save_pretrained(tmp_path / "packed")
    inside, outside = (gradients(adapted(tmp_path / "packed", offload)) for offload in (None, tmp_path))
    assert sum("o_proj" in name for name in inside) == 4
    assert all(grad.any() and torch.equal(grad, outside[name]) for name, grad in inside.items())
