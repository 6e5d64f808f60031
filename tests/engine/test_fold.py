from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as t
from oracles import gaussian, generator, same_bits
from torch import nn

from optimum_eggs.calibration import find_block_list
from optimum_eggs.engine.fold import (
    Fold,
    Rows,
    apply_fold,
    choose_orders,
    column_order,
    find_folds,
    permute_block,
    same_output,
)
from optimum_eggs.errors import NumericalError, ShapeError
from optimum_eggs.importance.ria import ria
from optimum_eggs.masks.permutation import kept_score
from optimum_eggs.nn import dense_weight, is_dense_linear
from optimum_eggs.nn.experts import split_experts
from optimum_eggs.pattern import NMPattern

PATTERN = NMPattern(2, 4)
WINDOWS = tiny.make_windows(4, 16)

# consumer: (rows of its producers, heads, copies, size)
GATED = {"mlp.down_proj": ([("mlp.gate_proj", 0, 64), ("mlp.up_proj", 0, 64)], 1, 1, 64)}
GROUPED = {"self_attn.o_proj": ([("self_attn.v_proj", 0, 8)], 2, 2, 8)}
LLAMA = GATED | GROUPED
EXPECTED = {
    "llama": LLAMA,
    "llama-untied": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA,
    "mistral": LLAMA,
    "opt": {
        "fc2": ([("fc1", 0, 64)], 1, 1, 64),
        "self_attn.out_proj": ([("self_attn.v_proj", 0, 8)], 4, 1, 8),
    },
    "gpt2": {
        "mlp.c_proj": ([("mlp.c_fc", 0, 128)], 1, 1, 128),
        "attn.c_proj": ([("attn.c_attn", 64, 8)], 4, 1, 8),
    },
    "gpt_neox": {
        "mlp.dense_4h_to_h": ([("mlp.dense_h_to_4h", 0, 64)], 1, 1, 64),
        "attention.dense": ([("attention.query_key_value", 16, 24)], 4, 1, 8),
    },
    "phi3": {
        "mlp.down_proj": ([("mlp.gate_up_proj", 0, 64), ("mlp.gate_up_proj", 64, 64)], 1, 1, 64),
        "self_attn.o_proj": ([("self_attn.qkv_proj", 48, 8)], 2, 2, 8),
    },
    "bert": {
        "output.dense": ([("intermediate.dense", 0, 64)], 1, 1, 64),
        "attention.output.dense": ([("attention.self.value", 0, 8)], 4, 1, 8),
    },
    "mixtral": GROUPED,  # its experts are no linear layers before they are split
    "qwen3_moe": GROUPED,
    "gpt_oss": GROUPED,
}

_SMALL = tiny._LLAMA | {"num_hidden_layers": 1}
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128, "vocab_size": tiny.VOCABULARY}
OTHERS = {
    "bitnet": lambda: t.BitNetForCausalLM(t.BitNetConfig(**_SMALL)),
    "nemotron": lambda: t.NemotronForCausalLM(t.NemotronConfig(**_SMALL)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=4)),
    "gpt_bigcode-1": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**_GPT2, multi_query=True)),
    "gpt_bigcode-4": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**_GPT2, multi_query=False)),
    "qwen3_next": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(**_SMALL, head_dim=8, layer_types=["full_attention"], mlp_only_layers=[0])
    ),
}


def random_model(make):
    """A model whose biases and norms are random too; they begin as zeros and ones."""
    torch.manual_seed(0)
    model = make().eval()
    draw = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def blocks_of(model):
    """(block, prefix, names of its linear layers) for every block."""
    block_list = find_block_list(model)
    for index, block in enumerate(block_list.blocks):
        prefix = f"{block_list.block_name(index)}."
        yield block, prefix, [prefix + name for name, module in block.named_modules() if is_dense_linear(module)]


def runner(model, block):
    """A function that runs the block on what it is given in a run of the model."""
    calls = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True):
        model(input_ids=WINDOWS, use_cache=False)
    args, kwargs = calls[0]

    def run():
        output = block(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    return run


def score_of(block, prefix):
    """RIA, with inputs of random sizes."""

    def score(name):
        weight = dense_weight(block.get_submodule(name.removeprefix(prefix))).float()
        return ria(weight, gaussian(weight.shape[1], seed=len(name)).exp())

    return score


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not same_bits(value, before[name])}


def random_orders(fold, seed=0):
    draw = generator(seed)
    return torch.stack([torch.randperm(fold.size, generator=draw) for _ in range(fold.heads)])


@torch.no_grad()
def logits(model):
    return model(input_ids=WINDOWS).logits


def test_every_architecture_is_in_the_table():
    assert EXPECTED.keys() == tiny.CONFIGS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_folds_found(name):
    for block, prefix, names in blocks_of(tiny.make_model(name)):
        expected = {
            Fold(prefix + consumer, tuple(Rows(prefix + path, *where) for path, *where in rows), *heads)
            for consumer, (rows, *heads) in EXPECTED[name].items()
        }
        folds = find_folds(block, prefix, names)
        assert len(folds) == len(expected)
        assert set(folds) == expected
        # a producer may stay dense, and a layer that stays dense is no consumer
        assert find_folds(block, prefix, [fold.consumer for fold in folds[:1]]) == folds[:1]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fold_changes_the_weights_and_not_the_model(name):
    model = random_model(lambda: tiny.make_model(name))
    expected, before = logits(model), state_of(model)
    moved = set()
    for block, prefix, names in blocks_of(model):
        for seed, fold in enumerate(find_folds(block, prefix, names)):
            apply_fold(block, prefix, fold, random_orders(fold, seed))
            layers = [fold.consumer, *(rows.name for rows in fold.producers)]
            moved |= {f"{layer}.weight" for layer in layers}
            moved |= {f"{layer}.bias" for layer in layers[1:] if f"{layer}.bias" in before}
    assert changed(model, before) == moved
    assert any(key.endswith("bias") for key in moved) == (name in ("opt", "gpt2", "gpt_neox", "bert", "gpt_oss"))
    after = logits(model)
    assert not torch.equal(after, expected)  # sums are reordered
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for key in moved:
        assert torch.equal(model.state_dict()[key].flatten().sort().values, before[key].flatten().sort().values)


def test_columns_and_rows_go_where_they_should():
    """One block, by loops."""
    model = tiny.make_model("llama")
    block, prefix, names = next(blocks_of(model))
    before = state_of(block)
    folds = {fold.consumer.removeprefix(prefix): fold for fold in find_folds(block, prefix, names)}
    orders = {name: random_orders(fold) for name, fold in folds.items()}
    for name, fold in folds.items():
        apply_fold(block, prefix, fold, orders[name])
    after = block.state_dict()
    for place, channel in enumerate(orders["mlp.down_proj"][0].tolist()):
        for producer in ("gate_proj", "up_proj"):
            assert torch.equal(after[f"mlp.{producer}.weight"][place], before[f"mlp.{producer}.weight"][channel])
        assert torch.equal(after["mlp.down_proj.weight"][:, place], before["mlp.down_proj.weight"][:, channel])
    for query_head in range(4):
        head = query_head // 2
        for place, channel in enumerate(orders["self_attn.o_proj"][head].tolist()):
            new, old = after["self_attn.v_proj.weight"], before["self_attn.v_proj.weight"]
            assert torch.equal(new[8 * head + place], old[8 * head + channel])
            new, old = after["self_attn.o_proj.weight"], before["self_attn.o_proj.weight"]
            assert torch.equal(new[:, 8 * query_head + place], old[:, 8 * query_head + channel])


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_a_permuted_block_keep_more(name, dtype):
    model = random_model(lambda: tiny.make_model(name, dtype=dtype))
    expected = logits(model)
    for block, prefix, names in blocks_of(model):
        folds, score = find_folds(block, prefix, names), score_of(block, prefix)
        before = {fold.consumer: score(fold.consumer) for fold in folds}
        orders = {fold.consumer: choose_orders(before[fold.consumer], fold, PATTERN) for fold in folds}
        weights = {fold.consumer: dense_weight(block.get_submodule(fold.consumer[len(prefix) :])) for fold in folds}
        old = {consumer: weight.clone() for consumer, weight in weights.items()}
        gains = permute_block(block, prefix, folds, before.__getitem__, PATTERN, runner(model, block))
        assert list(gains) == list(before)
        for fold in folds:
            value, columns = before[fold.consumer], column_order(fold, orders[fold.consumer])
            assert torch.equal(weights[fold.consumer], old[fold.consumer][:, columns])
            kept = kept_score(value[:, columns], PATTERN)
            assert gains[fold.consumer] == pytest.approx(kept / kept_score(value, PATTERN) - 1, abs=1e-12)
            assert 0.005 < gains[fold.consumer] < 0.5
    assert same_output(expected, logits(model))


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_folded_is_undone(name, caplog):
    undone = {
        "bitnet": ["self_attn.o_proj", "mlp.down_proj"],  # a norm with a weight before both
        "gpt_bigcode-4": ["attn.c_proj"],  # its c_attn is laid out head by head
        "qwen3_next": ["self_attn.o_proj"],  # the heads' outputs are gated channel by channel
    }.get(name, [])
    model = random_model(OTHERS[name])
    block, prefix, names = next(blocks_of(model))
    folds, before = find_folds(block, prefix, names), state_of(block)
    assert len(folds) == 2
    caplog.clear()
    gains = permute_block(block, prefix, folds, score_of(block, prefix), PATTERN, runner(model, block))
    assert [record.args[0].removeprefix(prefix) for record in caplog.records] == undone
    done = [fold for fold in folds if fold.consumer.removeprefix(prefix) not in undone]
    assert list(gains) == [fold.consumer for fold in done]
    layers = {layer for fold in done for layer in (fold.consumer, *(rows.name for rows in fold.producers))}
    assert {f"{prefix}{key}".rpartition(".")[0] for key in changed(block, before)} == layers


def test_a_wrong_order_for_grouped_queries_is_undone_bit_for_bit(caplog):
    model = random_model(lambda: tiny.make_model("llama"))
    block, prefix, _ = next(blocks_of(model))
    # As if the query heads 0 and 2 shared a value head: they are 0 and 1.
    rows = (Rows(f"{prefix}self_attn.v_proj", 0, 16),)
    wrong = Fold(f"{prefix}self_attn.o_proj", rows, heads=1, copies=2, size=16)
    before = state_of(block)
    gains = permute_block(block, prefix, [wrong], score_of(block, prefix), PATTERN, runner(model, block))
    assert gains == {}
    assert not changed(block, before)
    message = "model.layers.0.self_attn.o_proj: its inputs keep their order: with the rows of self_attn.v_proj"
    assert message in caplog.text


@pytest.mark.parametrize("spoilt", [None, 2])
def test_folds_of_experts_are_checked_together_and_only_then_one_by_one(spoilt, caplog):
    model = random_model(lambda: tiny.make_model("mixtral"))
    split_experts(model)
    block, prefix, names = next(blocks_of(model))
    folds, score, before = find_folds(block, prefix, names), score_of(block, prefix), state_of(block)
    experts = [f"{prefix}mlp.experts.{expert}.down_proj" for expert in range(4)]
    assert [fold.consumer for fold in folds] == [f"{prefix}self_attn.o_proj", *experts]
    if spoilt is not None:  # the rows of up, and not those of gate
        folds[1 + spoilt] = replace(folds[1 + spoilt], producers=folds[1 + spoilt].producers[1:])
    scores = {fold.consumer: score(fold.consumer) for fold in folds}
    runs, run = [], runner(model, block)
    gains = permute_block(block, prefix, folds, scores.__getitem__, PATTERN, lambda: runs.append(1) or run())
    assert len(runs) == (1 + 2 if spoilt is None else 1 + 2 + 4)  # before, attention, experts; and each of these
    wrong = [] if spoilt is None else [experts[spoilt]]
    assert [record.args[0] for record in caplog.records] == wrong
    assert list(gains) == [fold.consumer for fold in folds if fold.consumer not in wrong]
    for fold in folds:
        value, path = scores[fold.consumer], f"{fold.consumer.removeprefix(prefix)}.weight"
        columns = column_order(fold, choose_orders(value, fold, PATTERN))
        moved = columns.sort().values if fold.consumer in wrong else columns
        assert torch.equal(block.state_dict()[path], before[path][:, moved])
        if fold.consumer not in wrong:
            kept = kept_score(value[:, columns], PATTERN) / kept_score(value, PATTERN)
            assert gains[fold.consumer] == pytest.approx(kept - 1, abs=1e-12)
            assert gains[fold.consumer] > 0


def test_an_expert_that_a_fold_sends_no_token_to_any_more_is_left_out(caplog):
    model = random_model(lambda: tiny.make_model("mixtral"))
    split_experts(model)
    block, prefix, names = next(blocks_of(model))
    runs, run, experts = [], runner(model, block), block.get_submodule("mlp.experts")
    plain = experts.forward

    def forward(states, index, weights):  # expert 2 counts for nothing, and after the first run gets no token
        gone = index == 2
        return plain(states, index.masked_fill(gone, 4) if len(runs) > 1 else index, weights.masked_fill(gone, 0))

    experts.forward = forward
    folds, score = find_folds(block, prefix, names), score_of(block, prefix)
    gains = permute_block(block, prefix, folds, score, PATTERN, lambda: runs.append(1) or run())
    assert len(runs) == 3
    assert not caplog.records
    assert list(gains) == [fold.consumer for fold in folds if "experts.2." not in fold.consumer]


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
def test_a_fold_is_undone_by_the_inverse_orders(name):
    model = random_model(lambda: tiny.make_model(name))
    block, prefix, names = next(blocks_of(model))
    before = state_of(block)
    for fold in find_folds(block, prefix, names):
        orders = random_orders(fold)
        apply_fold(block, prefix, fold, orders)
        assert changed(block, before)
        apply_fold(block, prefix, fold, orders.argsort(1))
        assert not changed(block, before)


class Mlp(nn.Module):
    """A block that holds an MLP, or something like it."""

    def __init__(self, **layers):
        super().__init__()
        self.mlp = nn.Module()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def folds(self):
        return find_folds(self, "h.0.", ["h.0.mlp.down_proj"])


class NotQuiteLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "producers",
    [
        {},
        {"up_projection": nn.Linear(8, 16)},
        {"gate_proj": nn.Linear(8, 16), "up_proj": nn.Linear(8, 8)},
        {"gate_proj": NotQuiteLinear(8, 16), "up_proj": nn.Linear(8, 16)},
        {"gate_proj": nn.Linear(8, 16, device="meta"), "up_proj": nn.Linear(8, 16)},
        {"gate_proj": nn.Linear(8, 32), "up_proj": nn.Linear(8, 32)},
        {"gate_up_proj": nn.Linear(8, 48)},
    ],
)
def test_no_fold_without_its_producers(producers):
    assert Mlp(**producers, down_proj=nn.Linear(16, 8)).folds() == []


@pytest.mark.parametrize(
    ("heads", "values"),
    [
        ({"head_dim": 8}, 12),  # half a head
        ({"head_dim": 5}, 16),
        ({"head_dim": 8}, 24),  # three value heads for four query heads
        ({"num_heads": 3}, 32),
        ({}, 32),
        ({"head_dim": 8, "config": SimpleNamespace(num_kv_shared_layers=1)}, 32),  # read by a later block, unseen
    ],
)
def test_no_fold_without_heads_that_fit(heads, values):
    block = Mlp(v_proj=nn.Linear(32, values), o_proj=nn.Linear(32, 32))
    vars(block.mlp).update(heads)
    assert find_folds(block, "", ["mlp.o_proj"]) == []


@pytest.mark.parametrize(
    "heads",
    [
        {"head_dim": 8},
        {"v_head_dim": 8, "head_dim": 4},
        {"num_heads": 4},
        {"config": SimpleNamespace(num_attention_heads=4)},
    ],
)
def test_heads_are_told_by_any_of_their_names(heads):
    block = Mlp(v_proj=nn.Linear(32, 16), o_proj=nn.Linear(32, 32))
    vars(block.mlp).update(heads)
    assert find_folds(block, "", ["mlp.o_proj"]) == [Fold("mlp.o_proj", (Rows("mlp.v_proj", 0, 8),), 2, 2, 8)]


def test_groups_wider_than_a_head_stay_as_they_are():
    model = tiny.make_model("llama")
    block, prefix, names = next(blocks_of(model))
    before = state_of(block)
    folds = find_folds(block, prefix, names)
    gains = permute_block(block, prefix, folds, score_of(block, prefix), NMPattern(8, 16), runner(model, block))
    assert gains[f"{prefix}self_attn.o_proj"] == 0
    assert gains[f"{prefix}mlp.down_proj"] > 0
    assert changed(block, before) == {f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


def test_layers_that_do_not_run_stay_as_they_are():
    block = Mlp(up_proj=nn.Linear(8, 16), down_proj=nn.Linear(16, 8))
    before = state_of(block)
    assert permute_block(block, "h.0.", block.folds(), None, PATTERN, lambda: torch.ones(2, 3, 8)) == {}
    empty = torch.ones(0, 16)  # an expert that is sent no token

    def run():
        block.mlp.down_proj(empty)
        return torch.ones(2, 3, 8)

    assert permute_block(block, "h.0.", block.folds(), None, PATTERN, run) == {}
    assert permute_block(block, "h.0.", [], None, PATTERN, None) == {}
    assert not changed(block, before)


def test_values_that_are_used_elsewhere_too_are_seen(caplog):
    """The consumer gives the same, and the block does not."""
    block = Mlp(up_proj=nn.Linear(8, 16), down_proj=nn.Linear(16, 8))
    before, x = state_of(block), gaussian(2, 3, 8)

    def run():
        hidden = block.mlp.up_proj(x)
        return block.mlp.down_proj(hidden) + hidden[..., :8]

    assert permute_block(block, "h.0.", block.folds(), score_of(block, "h.0."), PATTERN, run) == {}
    assert "h.0.mlp.down_proj: its inputs keep their order" in caplog.text
    assert not changed(block, before)


def test_scores_that_do_not_fit():
    fold = Fold("h.0.mlp.down_proj", (), heads=1, copies=1, size=16)
    with pytest.raises(ShapeError, match=r"h\.0\.mlp\.down_proj: its score has shape \(8, 8\); it must be \(out, 16\)"):
        choose_orders(torch.ones(8, 8), fold, PATTERN)
    with pytest.raises(NumericalError, match="score holds NaN"):
        choose_orders(torch.full((8, 16), torch.inf), fold, PATTERN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_output_allows_for_rounding_and_nothing_else(dtype):
    x, weight = gaussian(64, 4096, dtype=dtype), gaussian(96, 4096, seed=1, dtype=dtype) / 64
    columns = torch.randperm(4096, generator=generator(2))
    before, after = x @ weight.T, x[:, columns] @ weight[:, columns].T
    assert same_output(before, after)
    assert not same_output(before, x[:, columns] @ weight.T)
    few = columns[:400]  # a tenth of the channels out of place
    wrong = weight.clone()
    wrong[:, few] = weight[:, few.roll(1)]
    assert not same_output(before, x @ wrong.T)


def test_same_output_sees_past_tokens_of_huge_norm():
    before = gaussian(4, 8, 32)
    before[:, 0] *= 1e6
    after = before.clone()
    after[:, 1:] = gaussian(4, 7, 32, seed=1)
    assert same_output(before, before.clone())
    assert not same_output(before, after)
    assert not same_output(torch.full((2, 4), torch.nan), torch.full((2, 4), torch.nan))
    assert not same_output(before, before[:2])
    assert same_output(torch.zeros(2, 4), torch.zeros(2, 4))
