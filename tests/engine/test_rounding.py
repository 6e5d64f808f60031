"""Models whose values become integers while they are pruned, and afterwards."""

import json
from functools import partial

import families
import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.engine.left_dense import check_left_dense
from optimum_eggs.engine.quantize import quantize_model
from optimum_eggs.errors import ConfigError, ModelError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.measure import Meter
from optimum_eggs.nn import CodedEmbedding, CodedLinear, coded_modules, dense_weight, packed_layers
from optimum_eggs.streaming import prune_checkpoint

IDS = tiny.make_windows(2, 12)
WINDOWS = tiny.make_windows(8, 16)


@pytest.fixture
def meter():
    with Meter() as meter:
        yield meter


def logits(model, ids=IDS):
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=ids).logits


def pruned(name="llama", preset="fast", **options):
    pruner = EGGSPruner(tiny.make_model(name))
    pruner.prune(EGGSConfig("2:4", preset=preset, num_samples=8, seq_len=16, band=8, **options), WINDOWS)
    return pruner


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name != "gemma3"])
def test_every_architecture_comes_back_bit_for_bit(name, values, tmp_path):
    pruner = pruned(name, values=values, head="int8")
    expected = logits(pruner.model)
    kind = type(pruner.model)
    pruner.save_pretrained(tmp_path / "packed")
    found = inspect_checkpoint(tmp_path / "packed")
    assert found.ok, found.violations
    assert {layer.coding for layer in found.layers} <= {"int8:128", "int4:128"}
    assert found.config["format_version"] == 2
    model = kind.from_pretrained(tmp_path / "packed")
    assert coded_modules(model).keys() == found.config["coded_modules"].keys()
    assert torch.equal(logits(model), expected)

    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "packed" / "config.json").read_text()
    )
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again")), expected)
    model.dequantize()
    assert not coded_modules(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_stay_tied_or_not(tied, tmp_path):
    pruner = pruned("llama" if tied else "llama-untied", head="int8")
    pruner.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert isinstance(model.model.embed_tokens, CodedEmbedding)
    assert isinstance(model.lm_head, CodedLinear)
    assert model.dtype == torch.bfloat16
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)
    base = AutoModel.from_pretrained(tmp_path / "out")
    states = pruner.model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(base(input_ids=IDS).last_hidden_state, states, rtol=1e-3, atol=1e-3)


def test_a_head_alone_leaves_the_layers_floats(tmp_path):
    pruner = pruned(head="int8")
    assert all(layer.weight.is_floating_point() for layer in packed_layers(pruner.model).values())
    pruner.save_pretrained(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").config["coded_modules"] == {"model.embed_tokens": "int8:128"}


@pytest.mark.parametrize(("name", "left"), [("llama", "down_proj"), ("gpt2", "c_proj"), ("opt", "layers.1")])
def test_layers_left_dense_on_request_are_stored_as_integers_too(name, left, tmp_path):
    pruner = pruned(name, ignore=["lm_head", left], ignored="int8")
    coded = pruner.model.config.quantization_config.coded_modules
    layers = [layer["name"] for layer in pruner.report.to_dict()["left_dense"] if left in layer["name"]]
    assert layers
    assert coded == dict.fromkeys(layers, "int8:128")
    dense = tiny.make_model(name)
    for layer in layers:
        weight = dense_weight(dense.get_submodule(layer))
        found = pruner.model.get_submodule(layer).dense_weight()
        assert 0 < float((found - weight).norm() / weight.norm()) < 0.01
    pruner.save_pretrained(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").ok
    model = type(pruner.model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(pruner.model))
    assert "left dense on request as `int8`" in (tmp_path / "out" / "README.md").read_text()
    model.dequantize()
    assert type(model.get_submodule(layers[0])) is type(dense.get_submodule(layers[0]))


def test_layers_that_share_a_weight_are_stored_each_by_itself():
    model = tiny.make_model("llama")
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    config = EGGSConfig(num_samples=8, seq_len=16, band=8, ignore=["lm_head", "o_proj"], ignored="int8", head="int8")
    EGGSPruner(model).prune(config, WINDOWS)
    first, second = (layer.self_attn.o_proj for layer in model.model.layers)
    assert torch.equal(first.dense_weight(), second.dense_weight())
    assert model.config.quantization_config.coded_modules.keys() == {
        "model.embed_tokens",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    }


def test_experts_and_routers_stay_floats():
    pruner = pruned("mixtral", ignore=["lm_head", "experts.*.down_proj", "v_proj"], ignored="int8")
    coded = pruner.model.config.quantization_config.coded_modules
    assert coded.keys() == {f"model.layers.{block}.self_attn.v_proj" for block in range(2)}
    by_targets = pruned("mixtral", targets=["experts"], ignored="int8").model.config.quantization_config.coded_modules
    assert {name.rpartition(".")[2] for name in by_targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_that_reads_the_weight_of_an_ignored_layer_is_refused():
    model = tiny.make_model("llama")
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*inputs, **options):
        states, weights = plain(*inputs, **options)
        return states + 0 * (states @ attention.v_proj.weight.t()).sum(), weights

    attention.forward = forward
    with pytest.raises(ConfigError, match=r"ignored='int8': LlamaForCausalLM cannot run with it: .*dtype"):
        EGGSPruner(model).prune(
            EGGSConfig(num_samples=8, seq_len=16, band=8, ignore=["v_proj"], ignored="int8"), WINDOWS
        )


def test_no_layer_that_is_left_dense_is_an_error():
    with pytest.raises(ConfigError, match=r"ignored='int8': `ignore` and `targets` leave no linear layer .* dense"):
        pruned(ignored="int8")


def test_without_integers_the_format_is_that_of_before(tmp_path):
    pruner = pruned()
    pruner.save_pretrained(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").config["format_version"] == 1


def test_embeddings_that_do_more_than_look_up_are_refused_before_anything_is_done():
    model = tiny.make_model("gemma3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"head='int8': model.embed_tokens is a Gemma3TextScaledWordEmbedding"):
        EGGSPruner(model).prune(EGGSConfig(num_samples=8, seq_len=16, head="int8"), WINDOWS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def error(model, dense, ids=IDS):
    """Relative error of the logits."""
    expected = logits(dense, ids)
    return float((logits(model, ids) - expected).norm() / expected.norm())


def test_eight_bits_cost_next_to_nothing_and_four_bits_less_with_errors_passed_on():
    dense = tiny.make_model("llama")
    plain, eight = (error(pruned(**options).model, dense) for options in ({}, {"values": "int8"}))
    assert eight < plain * 1.01
    passed = error(pruned(values="int4", value_group=64).model, dense)
    nearest = error(pruned(values="int4", value_group=64, rounding="nearest").model, dense)
    assert plain < passed < nearest


def test_tuning_with_the_rounding_in_the_loop_makes_up_for_some_of_it():
    options = {"preset": "best", "block_tuning": 8, "values": "int4", "value_group": 64, "tuning_lr": 0.003}
    reports = [pruned(rounding_tuning=steps, **options) for steps in (0, 60)]
    dense = tiny.make_model("llama")
    # On the windows themselves: random tokens tell nothing of others.
    untuned, tuned = (error(pruner.model, dense, WINDOWS) for pruner in reports)
    assert tuned < 0.98 * untuned
    for layer in packed_layers(reports[1].model).values():
        assert isinstance(layer, CodedLinear)


def test_a_packed_model_is_rounded_as_well(meter):
    pruner = pruned()
    masks = {name: layer.mask() for name, layer in packed_layers(pruner.model).items()}
    config = pruner.model.config.quantization_config.replace(values="int4", head="int8", rounding_tuning=4)
    codings, tuned = quantize_model(pruner.model, config, WINDOWS, meter, progress=False)
    layers = packed_layers(pruner.model)
    assert layers.keys() == masks.keys()
    assert all(torch.equal(layers[name].mask(), mask) for name, mask in masks.items())
    assert codings == dict.fromkeys(masks, "int4:128") | {"model.embed_tokens": "int8:128"}
    assert [block.block for block in tuned] == [0, 1]
    with pytest.raises(ModelError, match="holds integers already"):
        quantize_model(pruner.model, config, WINDOWS, meter, progress=False)


def test_what_cannot_be_rounded_is_refused_with_the_model_as_it_was(meter):
    pruner = pruned()
    stored = pruner.model.config.quantization_config
    expected = logits(pruner.model)
    with pytest.raises(ConfigError, match="needs calibration text"):
        quantize_model(pruner.model, stored.replace(values="int4"), None, meter)
    with pytest.raises(ConfigError, match="nothing is to be stored in integers"):
        quantize_model(pruner.model, stored, WINDOWS, meter)
    with pytest.raises(ModelError, match="no packed layer"):
        quantize_model(tiny.make_model("llama"), stored.replace(values="int8"), None, meter)
    assert torch.equal(logits(pruner.model), expected)


def test_experts_that_the_text_does_not_reach_are_rounded_too(meter):
    pruner = pruned("mixtral")
    config = pruner.model.config.quantization_config.replace(values="int4", min_expert_tokens=0)
    codings, _ = quantize_model(pruner.model, config, WINDOWS[:2], meter, progress=False)
    assert codings.keys() == packed_layers(pruner.model).keys()


def test_models_that_look_at_the_dtype_of_a_weight_are_refused():
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    config = EGGSConfig(num_samples=8, seq_len=16, band=8, values="int4", block_list="encoder.block")
    with pytest.raises(ModelError, match=r"encoder.block.0 cannot run with layers of integers: .*of torch.uint8"):
        EGGSPruner(model).prune(config, WINDOWS)


def test_a_packed_model_that_looks_at_the_dtype_of_a_weight_is_refused_too(meter):
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    EGGSPruner(model).prune(EGGSConfig(num_samples=8, seq_len=16, band=8, block_list="encoder.block"), WINDOWS)
    config = model.config.quantization_config.replace(values="int4")
    with pytest.raises(ModelError, match=r"encoder.block.0 cannot run with layers of integers: .*of torch.uint8"):
        quantize_model(model, config, WINDOWS, meter, progress=False)


@pytest.mark.parametrize("how", ["in memory", "from disk"])
def test_mamba_casts_to_the_dtype_of_its_head_and_is_refused_before_the_work(how, tmp_path):
    model = families.BY_NAME["MambaForCausalLM"].make()
    config = EGGSConfig(
        num_samples=8, seq_len=16, band=8, head="int8", ignore=["lm_head", "dt_proj"], preset="magnitude"
    )
    model.save_pretrained(tmp_path / "dense")
    prune = {
        "in memory": partial(EGGSPruner(model).prune, config, WINDOWS),
        "from disk": partial(
            prune_checkpoint, tmp_path / "dense", tmp_path / "out", config.replace(calibration=WINDOWS), progress=False
        ),
    }
    with pytest.raises(ConfigError, match=r"head='int8': MambaForCausalLM cannot run with it: .*inputs of torch.int8"):
        prune[how]()
    assert not [path.name for path in tmp_path.iterdir() if path.name != "dense"]


def test_nothing_is_seen_of_a_model_that_cannot_run_without_weights():
    def forward(**inputs):
        raise RuntimeError("what is chosen depends on numbers")

    kind, config = tiny.CONFIGS["llama"]()
    with torch.device("meta"):
        model = kind._from_config(config)
    head, model.forward = model.lm_head, forward
    check_left_dense(model, EGGSConfig(head="int8"))
    assert model.lm_head is head
    model = tiny.make_model("llama")
    model.forward = forward
    with pytest.raises(RuntimeError, match="depends on numbers"):
        check_left_dense(model, EGGSConfig(head="int8"))


def test_models_that_look_at_the_dtype_of_the_head_are_refused():
    model = tiny.make_model("llama")
    head, plain = model.lm_head, model.forward

    def forward(**inputs):
        found = plain(**inputs)
        model.lm_head(torch.ones(1, 32).to(model.lm_head.weight.dtype))
        return found

    model.forward = forward
    with pytest.raises(ConfigError, match=r"head='int8': LlamaForCausalLM cannot run with it: .*inputs of torch.int8"):
        EGGSPruner(model).prune(EGGSConfig(num_samples=8, seq_len=16, band=8, head="int8"), WINDOWS)
    assert model.lm_head is head
    assert head.weight is model.model.embed_tokens.weight


def test_embeddings_that_others_share_are_refused():
    model = tiny.make_model("llama")
    model.other = torch.nn.Embedding(tiny.VOCABULARY, 32)
    model.other.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"head='int8': model.embed_tokens shares its weight with other"):
        EGGSPruner(model).prune(EGGSConfig(num_samples=8, seq_len=16, head="int8"), WINDOWS)


def test_layers_of_several_patterns_have_the_coding_that_each_can_have(meter, tmp_path):
    kind, config = tiny.CONFIGS["llama"]()
    config.intermediate_size = 36
    model = kind._from_config(config).eval()
    with torch.no_grad():
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                kept = 1 if name.endswith("down_proj") else 2
                module.weight.unflatten(1, (-1, 4))[..., kept:] = 0
    pruner = EGGSPruner(model)
    pruner.pack()
    stored = model.config.quantization_config
    codings, _ = quantize_model(model, stored.replace(values="int4", rounding="nearest"), None, meter)
    assert codings["model.layers.0.mlp.down_proj"] == "int8:128"
    assert codings["model.layers.0.mlp.up_proj"] == "int4:128"


def test_loading_a_state_dict_and_offloading_to_disk(tmp_path):
    pruner = pruned(values="int4", head="int8")
    pruner.save_pretrained(tmp_path / "out")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(again), expected)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    (tmp_path / "offload").mkdir()
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(offloaded), expected)


def test_embeddings_of_integers_do_not_grow():
    pruner = pruned(head="int8")
    model = pruner.model
    assert model.resize_token_embeddings(tiny.VOCABULARY) is model.model.embed_tokens
    with pytest.raises(ModelError, match=r"resize_token_embeddings\(300\): the embeddings hold integers"):
        model.resize_token_embeddings(300)
    with pytest.raises(ModelError, match=r"resize_token_embeddings\(300\)"):
        model.resize_token_embeddings(tiny.VOCABULARY, pad_to_multiple_of=100)
    model.dequantize()
    assert model.resize_token_embeddings(300).num_embeddings == 300
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_integers_are_not_trained_without_an_adapter():
    assert not pruned(values="int8").model.hf_quantizer.is_qat_trainable
    assert pruned(head="int8").model.hf_quantizer.is_qat_trainable


def test_what_holds_floats_is_of_version_1_whatever_was_asked_for(tmp_path):
    pruner = pruned(values="int8")
    for name, layer in packed_layers(pruner.model).items():
        pruner.model.set_submodule(name, layer.to_packed())
    expected = logits(pruner.model)
    pruner.model.save_pretrained(tmp_path / "floats")
    found = inspect_checkpoint(tmp_path / "floats")
    assert found.ok, found.violations
    assert found.config["format_version"] == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "floats")), expected)
