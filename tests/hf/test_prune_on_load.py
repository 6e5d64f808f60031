from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.errors import CalibrationError, ModelError
from optimum_eggs.hf.loading import found_by


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLinear)}


def config(**changes):
    return EGGSConfig("2:4", **({"num_samples": 8, "seq_len": 16, "band": 8, "seed": 5} | changes))


@pytest.mark.parametrize("generated", [0, 5])
def test_it_gives_the_weights_that_the_pruner_gives(generated, dense_folder, text_file):
    wanted = config(generated_samples=generated)
    given = wanted.replace(calibration=str(text_file))
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=given)
    pruner = EGGSPruner.from_pretrained(dense_folder)
    pruner.prune(wanted, calibration=text_file)
    ours, theirs = packed(pruner.model), packed(model)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert torch.equal(layer.weight, theirs[name].weight)
        assert torch.equal(layer.weight_meta, theirs[name].weight_meta)
    assert model.hf_quantizer.report.calibration == pruner.report.calibration


def test_another_seed_gives_other_windows(dense_folder, text_file):
    digests = set()
    for seed in (0, 1):
        pruner = EGGSPruner.from_pretrained(dense_folder)
        digests.add(pruner.prune(config(seed=seed), calibration=text_file).calibration["sha256"])
    assert len(digests) == 2


def test_it_saves_and_loads(dense_folder, text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config(calibration=str(text_file)))
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(4, 16)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.quantization_config.calibration == "text.txt"


def test_texts_and_a_tokenizer_may_be_given(dense_folder, text_file, tokenizer):
    texts = [text_file.read_text()]
    given = config(calibration=texts, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=given)
    assert len(packed(model)) == 14
    assert model.config.quantization_config.calibration is None


def test_token_ids_need_no_tokenizer(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    model.save_pretrained(tmp_path / "bare")
    ids = torch.randint(4, 256, (8, 16))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", quantization_config=config(calibration=ids))
    assert len(packed(pruned)) == 14


def test_the_tokenizer_is_that_of_the_subfolder(dense_folder, text_file, tmp_path):
    shutil.copytree(dense_folder, tmp_path / "all" / "one")
    given = config(calibration=str(text_file))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "all", subfolder="one", quantization_config=given)
    assert len(packed(model)) == 14
    pruner = EGGSPruner.from_pretrained(tmp_path / "all", subfolder="one")
    pruner.prune(config(), calibration=text_file)
    assert len(packed(pruner.model)) == 14


@pytest.mark.parametrize(("inside", "expected"), [("", {}), ("one/two/", {"subfolder": "one/two"})])
def test_of_a_model_on_the_hub_subfolder_and_cache_are_those_of_its_file(inside, expected):
    file = f"/home/me/cache/models--me--model/snapshots/{'a1' * 20}/{inside}model.safetensors"
    assert found_by("me/model", file) == {"cache_dir": "/home/me/cache"} | expected
    assert found_by("me/model", None) == {}


def test_without_calibration_it_says_what_is_missing(dense_folder):
    with pytest.raises(CalibrationError, match="calibration=None: pass a text file"):
        AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config())


def test_offloading_to_disk_is_refused(dense_folder, text_file, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ModelError, match="what is not in memory cannot be pruned on load"):
        AutoModelForCausalLM.from_pretrained(
            dense_folder,
            quantization_config=config(calibration=str(text_file)),
            device_map=places,
            offload_folder=tmp_path,
        )
