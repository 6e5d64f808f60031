"""The attention `eggs` and compiled generation: the tokens and the logits are those of the model as it is."""

import copy
import gc
import weakref
from functools import partial

import pytest
import tiny
import torch
import transformers as t
from oracles import gaussian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_eggs import EGGSConfig, EGGSPruner, compile_generation
from optimum_eggs.errors import ModelError
from optimum_eggs.hf import attention, program

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
}
GREEDY = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


@pytest.fixture(params=MODELS)
def model(request, tokenizer, config):
    torch.manual_seed(0)
    pruner = EGGSPruner(MODELS[request.param]().eval(), tokenizer)
    pruner.prune(config, calibration=tiny.make_windows(8, 16))
    return pruner.model


def prompts():
    """Two, the first of which is shorter: the mask is then not of the causal kind."""
    ids = tiny.make_windows(2, 12)
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoded(model, **options):
    given = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    found = model.generate(**prompts(), **GREEDY, **given, **options)
    return found.sequences, torch.stack(found.logits)


def test_generation_is_that_of_sdpa(model, monkeypatch):
    sequences, logits = decoded(model)
    model.set_attn_implementation("eggs")
    assert model.config._attn_implementation == "eggs"
    calls = []
    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(args) or torch.ops.optimum_eggs.attend(*args))
    for cache in ("dynamic", "static"):
        calls.clear()
        found, same = decoded(model, cache_implementation=cache)
        assert len(calls) == 19 * 2  # tokens by layers; the first comes of the prompt
        assert torch.equal(found, sequences)
        torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)


def test_derivatives_are_those_of_sdpa(model):
    ids = tiny.make_windows(2, 1)
    embedded = gaussian(2, 1, 64).requires_grad_()
    grads = []
    for name in ("sdpa", "eggs"):
        model.set_attn_implementation(name)
        model(inputs_embeds=embedded, labels=ids, shift_labels=ids).loss.backward()
        grads.append(embedded.grad.clone())
        embedded.grad = None
    assert torch.equal(*grads)


OTHERS = {
    "granite": (t.GraniteForCausalLM, t.GraniteConfig, {"attention_multiplier": 0.2}),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config, {}),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config, {"sliding_window": 8}),
    "qwen2": (
        t.Qwen2ForCausalLM,
        t.Qwen2Config,
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": 16}),
    "smollm3": (t.SmolLM3ForCausalLM, t.SmolLM3Config, {"no_rope_layers": [1, 0]}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_other_architectures_generate_as_by_plain_attention(name, cache):
    model, config, more = OTHERS[name]
    torch.manual_seed(0)
    model = model(config(**SIZES, **more)).eval()
    model.set_attn_implementation("eager")
    sequences, logits = decoded(model, cache_implementation=cache)
    model.set_attn_implementation("eggs")
    found, same = decoded(model, cache_implementation=cache)
    assert torch.equal(found, sequences)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)


def test_every_type_that_is_known_is_compared():
    assert {*OTHERS, "llama", "mistral", "gemma3_text"} == attention.KNOWN


def test_types_that_are_not_known_are_refused():
    model = t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=16)).eval()
    model.set_attn_implementation("eggs")
    with torch.no_grad(), pytest.raises(ModelError, match="not known to be right for models of the type 'gemma2'"):
        model(tiny.make_windows(1, 8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_generation_gives_the_same_tokens(model, tmp_path):
    sequences, logits = decoded(model)
    assert compile_generation(model) is model
    found, same = decoded(model)
    (kept,) = program._PROGRAMS[model]
    assert torch.equal(found, sequences)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(decoded(model, cache_implementation="dynamic")[0], sequences)
    for options in ({"past_key_values": t.DynamicCache(config=model.config)}, {"use_cache": False}):
        assert torch.equal(decoded(model, **options)[0], sequences)

    assert program._PROGRAMS[model] == [kept]

    # A copy has weights of its own, and what is saved says nothing of how it was run.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not decoded(other)[1].any()
    assert torch.equal(decoded(model)[0], sequences)
    model.save_pretrained(tmp_path)
    assert t.GenerationConfig.from_pretrained(tmp_path).cache_implementation is None
    model.dequantize()
    assert not {"generate", "get_compiled_call"} & vars(model).keys()


def one(name="llama", pattern="2:4", **config):
    """A packed model whose generation is compiled."""
    torch.manual_seed(0)
    settings = EGGSConfig(pattern, num_samples=8, seq_len=16, band=8)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **config)) if config else MODELS[name]()
    pruner = EGGSPruner(model.eval(), tiny.make_tokenizer())
    pruner.prune(settings, calibration=tiny.make_windows(8, 16))
    return compile_generation(pruner.model)


def check(model):
    """What it gives compiled is what it gives as it is."""
    expected, logits = decoded(model, cache_implementation="dynamic")
    found, same = decoded(model)
    assert torch.equal(found, expected)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    return program._PROGRAMS[model][-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_models_of_one_class_have_programs_of_their_own():
    """Their packed tensors have equal shapes, and what is not checked at every call tells them apart."""
    models = [one(pattern="2:4"), one(pattern="4:8")]
    programs = [check(model) for model in models]
    assert programs[0] is not programs[1]
    assert [check(model) for model in models] == programs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_change_between_generations_is_seen():
    model = one(tie_word_embeddings=True)
    programs = [check(model)]

    def changed():
        programs.append(check(model))
        assert programs[-1] is not programs[-2]

    layer = model.model.layers[0]
    layer.self_attn.scaling *= 2
    changed()
    layer.mlp.register_forward_hook(lambda module, inputs, out: out * 0.5)
    changed()
    layer.mlp._forward_hooks.clear()
    layer.mlp = model.model.layers[1].mlp
    changed()
    model.to(torch.float64)
    changed()
    layer.input_layernorm.weight.data *= 3  # values are read where they are
    assert check(model) is programs[-1]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # no longer that of the embeddings
    model.lm_head.weight.data *= -1
    changed()
    model.set_attn_implementation("sdpa")
    changed()
    model.set_attn_implementation("eggs")
    assert check(model) is programs[-2]
    assert len(program._PROGRAMS[model]) == program._KEPT < len(programs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_nothing_that_is_compiled_keeps_a_model():
    model = one()
    check(model)
    model, gone = None, weakref.ref(model)
    torch._dynamo.reset()  # torch's own notes of what it compiled last
    gc.collect()
    assert gone() is None
    assert not program._PROGRAMS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_copy_of_what_a_caller_compiled_computes_by_itself():
    model = one()
    own = t.CompileConfig(mode="max-autotune-no-cudagraphs")
    own._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": own}
    expected = decoded(model, **options)[0]
    assert model not in program._PROGRAMS
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not decoded(other, **options)[1].any()
    assert torch.equal(decoded(model, **options)[0], expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_more_shapes_than_torch_keeps_begin_again(monkeypatch):
    made, new = [], program._new
    monkeypatch.setattr(program, "_new", lambda *args, **options: made.append(args) or new(*args, **options))
    model = one("gemma3")  # whose cache slides, which takes two shapes at least
    with torch._dynamo.config.patch(recompile_limit=1):
        check(model)
    assert len(made) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_is_no_single_program_is_compiled_in_parts(monkeypatch, caplog):
    model = one()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", torch.compiler.disable(plain_mlp))
    assert program.compiles_whole(model)
    check(model)
    assert "LlamaForCausalLM is compiled in parts" in caplog.text


def plain_mlp(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def scaled(factor):
    return lambda x: x * factor


def calls_itself():
    def again(x):
        return again(x)

    return again


def test_a_state_tells_what_functions_hold():
    model = MODELS["llama"]()
    functions = [scaled(2.0), scaled(3.0), partial(gelu, approximate="tanh"), partial(gelu), gelu, calls_itself()]
    functions += [model.model.layers[i].mlp.forward for i in range(2)]
    states = []
    for function in [*functions, scaled(2.0)]:
        model.model.layers[0].mlp.other = function
        states.append(program.model_state(model))
    assert states[-1] == states[0]
    assert all(states[i] != states[j] for i in range(len(functions)) for j in range(i))


def test_settings_of_the_callers_are_kept(monkeypatch):
    model, given = one(), []
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **options: given.append(options))
    theirs = t.CompileConfig(mode="default")
    ids = tiny.make_windows(1, 4)
    settings = [{"cache_implementation": "dynamic"}, {"use_cache": False}, {"compile_config": theirs}]
    settings += [{"prompt_lookup_num_tokens": 3}, {"disable_compile": True}]
    model.generate(ids, assistant_model=model)
    for own in settings:
        model.generate(ids, t.GenerationConfig(**own))
        model.generate(ids, generation_config=t.GenerationConfig(**own))
        model.generate(ids, **own)
    assert not any(options.get("cache_implementation") == "static" for options in given)
    model.generation_config.cache_implementation = "hybrid"  # an older name, of which generate() makes nothing
    model.generate(ids)
    model.generate(ids, t.GenerationConfig())
    assert [options.get("cache_implementation") for options in given[-2:]] == ["static", "static"]
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, settings: "as transformers does")
    theirs._compile_all_devices = True
    assert model.get_compiled_call(theirs) == "as transformers does"
    assert callable(model.get_compiled_call(copy.deepcopy(given[-1]["compile_config"])))


def test_positions_by_the_length_so_far_are_no_single_program():
    config = t.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert not program.compiles_whole(t.LlamaForCausalLM(config))
    model = MODELS["gemma3"]()
    assert program.compiles_whole(model)
    model.model.rotary_emb.rope_type["sliding_attention"] = "longrope"
    assert not program.compiles_whole(model)


def test_a_model_of_another_type_keeps_its_attention(model, monkeypatch):
    monkeypatch.setattr(attention, "KNOWN", frozenset())
    compile_generation(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_watches_sees_the_operations_of_torch(model):
    model.set_attn_implementation("eggs")
    layer = next(module for module in model.modules() if hasattr(module, "num_key_value_groups"))
    q, k = gaussian(1, 4, 1, 16), gaussian(1, 2, 9, 16, seed=1)

    def seen(q):
        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        names = []
        with Names():
            attention.attention_forward(layer, q, k, k, None)
        return names

    with torch.no_grad():
        names = seen(q)
    assert any("scaled_dot_product" in name for name in names)
    assert not any("optimum_eggs" in name for name in names)

    def attended(q):
        return attention.attention_forward(layer, q, k, k, None)[0]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(attended, (q,), (q,))
        step = (attended(q * 1.01) - attended(q * 0.99)) / 0.02
    torch.testing.assert_close(tangent, step, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_compiled_is_said(model, monkeypatch):
    with pytest.raises(ModelError, match="is not packed"):
        compile_generation(tiny.make_model("llama"))
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ModelError, match="cannot compile"):
        compile_generation(model)
    monkeypatch.undo()
    monkeypatch.setattr(model.config, "model_type", "llama4_text")
    with pytest.raises(ModelError, match="cannot compile"):
        compile_generation(model)
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    with pytest.raises(ModelError, match="on meta"):
        compile_generation(model)
    assert "generate" not in vars(model)
