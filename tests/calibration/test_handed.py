"""What blocks hand on to later ones besides hidden states: keys and values, a bias, what a router makes of tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import InMemoryBlocks, Walk, batches_of, find_block_list
from optimum_eggs.calibration.context import text_inputs
from optimum_eggs.engine import block as block_engine
from optimum_eggs.engine import prune_model
from optimum_eggs.engine.prune import evaluation_mode
from optimum_eggs.errors import ModelError
from optimum_eggs.measure import Meter

WINDOWS = tiny.make_windows(6, 16)


def gemma4():
    """Blocks 2 and 3 read the keys and values that blocks 0 and 1 have written down."""
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256}
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = tiny._LLAMA | sizes | layers | {"num_kv_shared_layers": 2, "sliding_window": 8}
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**config))


def t5():
    """Block 0 gives the bias of positions that all other blocks read."""
    sizes = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def zaya():
    """Every router reads what the one before made of the tokens."""
    small = {key: tiny._LLAMA[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")}
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "router_hidden_size": 32}
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "use_eda": True}
    return transformers.ZayaForCausalLM(transformers.ZayaConfig(**small, **sizes, **experts))


def rwkv(**values):
    return transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=256, hidden_size=32, num_hidden_layers=7, **values)
    )


MODELS = {
    "gemma4": (gemma4, None),
    "t5": (t5, "decoder.block"),
    "zaya": (zaya, None),
    "rwkv": (lambda: rwkv(rescale_every=0), None),
}


def made(name):
    if name in ("gemma4", "zaya") and not hasattr(
        transformers, {"gemma4": "Gemma4Text", "zaya": "Zaya"}[name] + "Config"
    ):
        pytest.skip("this transformers does not know it")
    make, block_list = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    return model, block_list


def states_of(model, found, batches):
    """What every block gives in a run of the whole model, by block and batch."""
    states = [[] for _ in found.blocks]
    hooks = [
        block.register_forward_hook(
            lambda module, args, output, into=into: into.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
        for block, into in zip(found.blocks, states, strict=True)
    ]
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            model(**text_inputs(model, batch))
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("name", MODELS)
def test_the_walk_gives_the_hidden_states_of_the_whole_forward(name):
    model, block_list = made(name)
    found = find_block_list(model, block_list)
    batches = batches_of(WINDOWS, 4, 0.5, 0)  # batches of four windows and of two, and of short windows
    assert len({batch.shape for batch in batches}) == 3
    expected = states_of(model, found, batches)
    with evaluation_mode(model), Meter() as meter:
        walk = Walk(InMemoryBlocks(model, found), batches, meter)
        for index, block in enumerate(found.blocks):
            walk.advance(block, index)
            assert all(torch.equal(a, b) for a, b in zip(walk.hidden, expected[index], strict=True)), index
    assert not any(handed.extras for handed in walk.handed)


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize("name", MODELS)
def test_the_dense_stream_is_that_of_the_dense_model(name, preset, monkeypatch):
    model, block_list = made(name)
    found = find_block_list(model, block_list)
    config = EGGSConfig(
        "2:4",
        preset=preset,
        batch_size=2,
        band=4,
        min_degree=0,
        block_list=block_list,
        rotation=False,
        **{"block_tuning": 2, "permutation": False} if preset == "best" else {},
    )
    expected = states_of(model, found, batches_of(WINDOWS, 2, config.short_share, config.seed))
    passed = {}
    advance = block_engine.DenseStream.advance

    def advanced(stream, block, index):
        advance(stream, block, index)
        passed[index] = list(stream.hidden)

    monkeypatch.setattr(block_engine.DenseStream, "advance", advanced)
    prune_model(model, config, WINDOWS)
    assert len(passed) >= len(found.blocks) - 1
    for index, states in passed.items():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(states, expected[index], strict=True)), index


@pytest.mark.parametrize("preset", ["wanda", "fast", "best"])
def test_kept_attention_leaves_the_keys_and_values_of_the_pruned_model(preset, monkeypatch):
    found = []
    for _ in range(2):
        model, _ = made("gemma4")
        values = {"block_tuning": 2} if preset == "best" else {}
        prune_model(model, EGGSConfig("2:4", preset=preset, batch_size=2, band=4, min_degree=0, **values), WINDOWS)
        found.append(model.state_dict())
        monkeypatch.setattr(Walk, "settle", lambda *given: None)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_keys_and_values_are_read_in_the_dtype_that_the_block_runs_in():
    model, _ = made("gemma4")
    report = prune_model(
        model.to(torch.bfloat16), EGGSConfig("2:4", preset="best", batch_size=2, block_tuning=2), WINDOWS
    )
    assert len(report.tuning) == 4
    assert model(WINDOWS).logits.dtype is torch.bfloat16


def test_a_model_that_changes_hidden_states_between_blocks_is_refused():
    with pytest.raises(ModelError, match=r"block 6 does not get the hidden states that block 5 gives.*rescale_every=0"):
        prune_model(rwkv().eval(), EGGSConfig("2:4", preset="wanda"), WINDOWS)
