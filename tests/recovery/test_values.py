"""Training the packed values themselves, with nothing of ours in the user's calls."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import packed_layers

WINDOWS = tiny.make_windows(8, 16)


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["plain", "bf16"])
def test_the_trainer_trains_every_value_under_the_mask(options, packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in packed_layers(model).items()}
    loss = model(input_ids=WINDOWS, labels=WINDOWS).loss.item()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in WINDOWS])
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    assert model(input_ids=WINDOWS, labels=WINDOWS).loss.item() < loss
    for name, layer in packed_layers(model).items():
        assert not torch.equal(layer.weight, before[name]["weight"])
        assert torch.equal(layer.weight_meta, before[name]["weight_meta"])
    assert inspect_checkpoint(tmp_path / "trained").ok
    trained, again = model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert trained.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in trained.items())
    kept = {name: layer.mask() for name, layer in packed_layers(model).items()}
    model.dequantize()
    assert not any(model.get_parameter(f"{name}.weight")[~mask].any() for name, mask in kept.items())


@pytest.mark.parametrize("values", [{}, {"preset": "best", "block_tuning": 2, "batch_size": 2}], ids=["fast", "best"])
def test_a_model_just_pruned_asks_for_gradients_as_before(values, tokenizer):
    pruner = EGGSPruner(tiny.make_model("llama"), tokenizer)
    pruner.model.model.layers[0].mlp.up_proj.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in pruner.model.named_parameters()}
    pruner.prune(EGGSConfig("2:4", num_samples=8, seq_len=16, band=8, **values), calibration=tiny.make_windows(8, 16))
    assert {name: parameter.requires_grad for name, parameter in pruner.model.named_parameters()} == asked
    assert list(asked.values()).count(False) == 1


def test_a_step_on_a_packed_mixture_keeps_its_zeros(tokenizer):
    pruner = EGGSPruner(tiny.make_model("qwen3_moe"), tokenizer)
    config = EGGSConfig("2:4", preset="magnitude", num_samples=2, seq_len=16)
    pruner.prune(config, calibration=tiny.make_windows(2, 16))
    model = pruner.model.train()
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in packed_layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    optimizer.step()
    for name, layer in packed_layers(model).items():
        assert not torch.equal(layer.weight, before[name]["weight"])
        assert torch.equal(layer.weight_meta, before[name]["weight_meta"])
