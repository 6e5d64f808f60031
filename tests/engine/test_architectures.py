"""Models that are no plain decoders: halves of encoder-decoders, and what reads no text; and Falcon's own layers."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as t
from safetensors.torch import load_file

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear
from optimum_eggs.errors import ModelError
from optimum_eggs.evaluation.perplexity import perplexity
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.streaming import prune_checkpoint

IDS = tiny.make_windows(2, 8)
BOTH = {
    **tiny._SMALL,
    **{"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2},
    **{
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"layers": 2, "ffn_dim": 64, "attention_heads": 4}.items()
    },
}
T5 = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**BOTH, forced_eos_token_id=None)),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**BOTH, max_source_positions=32, num_mel_bins=8)
    ),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL, intermediate_size=64, image_size=16, patch_size=4)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**tiny._SMALL, **SMALL)),
    "falcon, new": lambda: t.FalconForCausalLM(
        t.FalconConfig(**tiny._SMALL, **SMALL, new_decoder_architecture=True, num_kv_heads=2)
    ),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def config(block_list=None, **changes):
    given = {"num_samples": 8, "seq_len": 16, "band": 8, "calibration": tiny.make_windows(8, 16)}
    return EGGSConfig("2:4", block_list=block_list, **given | changes)


def logits(model):
    decoder = {} if not model.config.is_encoder_decoder else {"decoder_input_ids": IDS}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(
    ("name", "block_list", "layers"),
    [
        ("t5", "encoder.block", 12),
        ("t5", "decoder.block", 20),
        ("bart", "model.encoder.layers", 12),
        ("bart", "model.decoder.layers", 20),
        ("falcon", None, 8),
        ("falcon, new", None, 8),
    ],
)
def test_it_is_pruned_in_memory_and_from_disk_and_comes_back(name, block_list, layers, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    pruner = EGGSPruner(model)
    report = pruner.prune(config(block_list), progress=False)
    assert len(report.layers) == layers
    assert all(layer.relative_error is not None for layer in report.layers)  # each was calibrated
    expected = logits(model)
    pruner.save_pretrained(tmp_path / "packed")
    prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", config(block_list), progress=False)
    for folder in ("packed", "streamed"):
        again = type(model).from_pretrained(tmp_path / folder)
        assert sum(isinstance(layer, NMLinear) for layer in again.modules()) == layers
        assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.dequantize()), expected)


def test_the_text_reaches_a_decoder_behind_its_start_token():
    model, seen = make("t5"), {}
    for half in ("encoder", "decoder"):
        embedding = model.get_submodule(half).embed_tokens
        embedding.register_forward_pre_hook(lambda module, args, half=half: seen.update({half: args[0]}))
    caches = []
    attention = model.decoder.block[0].layer[0].SelfAttention
    attention.register_forward_pre_hook(lambda module, args, kwargs: caches.append(kwargs), with_kwargs=True)
    report = EGGSPruner(model).prune(config("decoder.block", preset="magnitude", batch_size=8), progress=False)
    assert len(report.layers) == 20  # with the keys and values that come from the encoder
    assert torch.equal(seen["decoder"][:, 1:], seen["encoder"][:, :-1])
    assert set(seen["decoder"][:, 0].tolist()) == {model.config.decoder_start_token_id}
    assert caches
    assert not any(
        isinstance(given, t.Cache) for call in caches for given in call.values()
    )  # each pass would add to it
    assert model.decoder.config.use_cache


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("t5", r"\['decoder.block', 'encoder.block'\]"),
        ("bart", r"\['model.decoder.layers', 'model.encoder.layers'\]"),
    ],
)
def test_of_an_encoder_decoder_one_half_must_be_named(name, lists):
    with pytest.raises(ModelError, match=rf"text runs through {lists}, and one list is pruned; name it with `block_"):
        EGGSPruner(make(name)).prune(config(), progress=False)


@pytest.mark.parametrize(
    ("name", "block_list", "reads"),
    [
        ("whisper", None, "input_features"),
        ("whisper", "model.decoder.layers", "input_features"),
        ("vit", None, "pixel_values"),
    ],
)
def test_a_model_that_reads_no_text_is_refused_and_can_be_packed(name, block_list, reads, tmp_path):
    model = make(name)
    with pytest.raises(ModelError, match=rf"reads {reads}, and calibration is on text; it can only be packed as it is"):
        EGGSPruner(model).prune(config(block_list, calibration="sample"), progress=False)
    model.save_pretrained(tmp_path)  # without a tokenizer, which it needs none of to be refused
    with pytest.raises(ModelError, match=f"reads {reads}"):
        type(model).from_pretrained(tmp_path, quantization_config=config(block_list, calibration="sample"))

    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.weight.data[:, ::2] = 0
    packed = EGGSPruner(model)
    packed.pack("2:4", block_list=block_list or ("model.encoder.layers" if name == "whisper" else None), progress=False)
    assert any(isinstance(layer, NMLinear) for layer in packed.model.modules())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_no_perplexity(name):
    with pytest.raises(ModelError, match="is an encoder-decoder; perplexity needs a causal model"):
        perplexity(make(name), IDS)


@pytest.mark.skipif(not hasattr(t, "ExaoneConfig"), reason="this version of transformers does not know EXAONE")
@pytest.mark.usefixtures("reference_backend")
def test_packed_layers_have_their_own_names_in_files_where_transformers_changes_them(tmp_path):
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(t.ExaoneConfig(**tiny._LLAMA)).eval()
    made.save_pretrained(tmp_path / "dense")
    assert "transformer.h.0.mlp.c_proj.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(model), logits(made))
    pruner = EGGSPruner(model)
    pruner.prune(config(), progress=False)
    expected = logits(model)
    pruner.save_pretrained(tmp_path / "packed")
    prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", config(), progress=False)
    for folder in ("packed", "streamed", "again"):
        assert "model.layers.0.mlp.down_proj.weight_meta" in load_file(tmp_path / folder / "model.safetensors")
        assert inspect_checkpoint(tmp_path / folder).ok
        loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert sum(isinstance(layer, NMLinear) for layer in loaded.modules()) == 14
        assert torch.equal(logits(loaded), expected)
        if folder == "packed":
            loaded.save_pretrained(tmp_path / "again")
    loaded.dequantize().save_pretrained(tmp_path / "undone")  # as the original again
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("dense", "undone")]
    assert names[0] == names[1]
    assert torch.equal(logits(t.AutoModelForCausalLM.from_pretrained(tmp_path / "undone")), expected)


def test_a_vision_model_that_was_packed_comes_back(tmp_path):
    model, image = make("vit"), torch.ones(2, 3, 16, 16)
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.weight.data[:, ::2] = 0
    pruner = EGGSPruner(model)
    pruner.pack("2:4", progress=False)
    with torch.no_grad():
        expected = model(pixel_values=image).logits
        pruner.save_pretrained(tmp_path / "packed")
        assert inspect_checkpoint(tmp_path / "packed").ok
        again = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(again(pixel_values=image).logits, expected)
