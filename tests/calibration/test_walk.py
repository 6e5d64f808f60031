from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from optimum_eggs.calibration import DenseTwin, InMemoryBlocks, Walk, find_block_list
from optimum_eggs.calibration import walk as walking
from optimum_eggs.errors import ConfigError, ModelError
from optimum_eggs.measure import Meter
from optimum_eggs.nn import is_dense_linear
from optimum_eggs.ops import select, wide

WINDOWS = tiny.make_windows(5, 12)


def linears_of(model, name):
    return {full: module for full, module in model.get_submodule(name).named_modules() if is_dense_linear(module)}


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_walk_gives_the_hidden_states_of_the_whole_forward(name):
    # Gemma3's layers get different masks and rotary tables; a walk that hands all blocks the first one's differs.
    model = tiny.make_model(name)
    model.config.use_cache = False  # as pruning does
    found = find_block_list(model)
    outputs = []
    hook = found.blocks[-1].register_forward_hook(
        lambda module, args, output: outputs.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in WINDOWS.split(2):
            model(input_ids=batch, use_cache=False)
    hook.remove()
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, found), WINDOWS.split(2), meter)
        for index, block in enumerate(found.blocks):
            walk.advance(block, index)
    assert len(walk.hidden) == len(outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(walk.hidden, outputs, strict=True))


@pytest.mark.parametrize("faster", [True, False])
def test_halves_are_multiplied_in_float32_where_that_is_faster(faster, monkeypatch):
    multiply, widened, hidden = wide.linear, [], []
    monkeypatch.setattr(wide, "linear", lambda *given: widened.append(given[0].dtype) or multiply(*given))
    for module in (walking, select, wide):
        monkeypatch.setattr(module, "widens", lambda dtype, device: faster and dtype is torch.bfloat16)
    model, exact = (tiny.make_model("llama", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for linear in filter(is_dense_linear, model.modules()):
        linear.weight.data *= 4  # so that what the block adds to its inputs is not lost among them
    exact.load_state_dict(model.state_dict())
    for each in (model, exact):
        each.config.use_cache = False
        found = find_block_list(each)
        with Meter() as meter, torch.no_grad():
            walk = Walk(InMemoryBlocks(each, found), WINDOWS.split(5), meter)
            linear = linears_of(each, found.block_name(0))["self_attn.o_proj"]
            walk.statistics(found.blocks[0], 0, linear)  # which leaves the block where the layer is called
            walk.advance(found.blocks[0], 0)
        hidden.append(walk.hidden[0].float())
        before = each.get_input_embeddings()(WINDOWS).float()
        assert {type(module) for module in each.modules() if is_dense_linear(module)} == {nn.Linear}
    assert widened == [torch.bfloat16] * (3 + 7) * faster
    assert (hidden[0] - hidden[1]).norm() < 0.02 * (hidden[1] - before).norm()


def test_statistics_beside_a_dense_twin_pair_the_same_tokens():
    model = tiny.make_model("llama")
    model.config.use_cache = False
    found = find_block_list(model)
    block = found.blocks[0]
    linear = linears_of(model, found.block_name(0))["mlp.down_proj"]
    twin = copy.deepcopy(block)
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, found), WINDOWS.split(2), meter)
        hidden = [states + 1 for states in walk.hidden]
        dense = DenseTwin(twin, twin.mlp.down_proj, hidden, walk.handed)
        statistics = walk.statistics(block, 0, linear, dense)
        walk.hidden = hidden
        other = walk.statistics(block, 0, linear, dense)
        alone = walk.statistics(block, 0, linear)
    assert alone.cross is None
    assert torch.equal(other.gram, alone.gram)
    assert torch.allclose(other.cross, other.gram)  # on the same hidden states they are the same inputs
    assert not torch.allclose(statistics.cross, statistics.gram)
    # Cauchy-Schwarz, input by input
    assert (statistics.cross.diagonal() ** 2 <= statistics.gram.diagonal() * other.gram.diagonal() * 1.0001).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "bert"])
def test_statistics_are_the_gram_matrix_of_the_inputs(name):
    model = tiny.make_model(name)
    found = find_block_list(model)
    linears = linears_of(model, found.block_name(1))
    inputs: dict[str, list[torch.Tensor]] = {full: [] for full in linears}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, full=full: inputs[full].append(args[0].flatten(0, -2)))
        for full, module in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, found), WINDOWS.split(2), meter)
        walk.advance(found.blocks[0], 0)
        for full, module in linears.items():
            statistics = walk.statistics(found.blocks[1], 1, module)
            x = torch.cat(inputs[full]).double()
            # float32 sums of 60 products, in another order: 60 roundings of 2^-24 of the largest sum
            bound = 60 * 2**-24 * float((x.abs().T @ x.abs()).max())
            assert (statistics.gram - x.T @ x).abs().max() <= bound
            assert statistics.tokens == WINDOWS.numel()


def test_stages_share_an_input_and_follow_the_order_of_execution():
    model = tiny.make_model("llama")
    found = find_block_list(model)
    linears = linears_of(model, "model.layers.0")
    with Meter() as meter:
        stages = Walk(InMemoryBlocks(model, found), WINDOWS.split(2), meter).stages(found.blocks[0], 0, linears)
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_the_model_is_left_as_it_was_after_recording():
    model = tiny.make_model("llama")
    before = model(input_ids=WINDOWS).logits
    with Meter() as meter:
        Walk(InMemoryBlocks(model, find_block_list(model)), WINDOWS.split(2), meter)
    assert torch.equal(model(input_ids=WINDOWS).logits, before)
    assert not any("forward" in block.__dict__ for block in model.model.layers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("gpt2", "transformer.h"),
        ("gpt_neox", "gpt_neox.layers"),
        ("bert", "bert.encoder.layer"),
        ("mixtral", "model.layers"),
    ],
)
def test_the_block_list_is_found_by_structure(name, expected):
    found = find_block_list(tiny.make_model(name))
    assert found.name == expected
    assert len(found.blocks) == 2


class TwoLists(nn.Module):
    """Two block lists, of which text runs through `used`."""

    def __init__(self, used: list[str]) -> None:
        super().__init__()
        self.used = used
        self.embed = nn.Embedding(8, 4)
        self.vision = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.text = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for name in self.used:
            for block in getattr(self, name):
                x = block(x)
        return x


def test_of_several_lists_the_one_that_text_runs_through_is_taken():
    assert find_block_list(TwoLists(["text"])).name == "text"
    assert find_block_list(TwoLists(["text", "vision"]), "vision").name == "vision"


def test_an_ambiguous_model_is_refused():
    with pytest.raises(ModelError, match=r"text runs through \['text', 'vision'\]"):
        find_block_list(TwoLists(["text", "vision"]))
    with pytest.raises(ModelError, match=r"it has no nn.ModuleList with linear layers inside"):
        find_block_list(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="block_list='embed' is no list of blocks of this model; pass one of"):
        find_block_list(TwoLists(["text"]), "embed")


def test_blocks_that_share_weights_are_refused():
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    model = transformers.AlbertModel(transformers.AlbertConfig(**small, embedding_size=32, num_hidden_layers=3))
    with pytest.raises(ModelError, match="runs 3 times; blocks that share weights cannot be pruned"):
        find_block_list(model)


def test_a_model_that_skips_a_block_is_refused():
    model = TwoLists(["text"])
    found = find_block_list(model)
    found.blocks.append(nn.Linear(4, 4))
    with Meter() as meter, pytest.raises(ModelError, match="the model ran 3 of its 4 blocks"):
        Walk(InMemoryBlocks(model, found), [torch.zeros(2, 3, dtype=torch.int64)], meter)


def test_input_norms_are_those_of_the_gram_matrix():
    model = tiny.make_model("llama")
    model.config.use_cache = False
    found = find_block_list(model)
    linears = linears_of(model, found.block_name(0))
    with Meter() as meter:
        walk = Walk(InMemoryBlocks(model, found), WINDOWS.split(2), meter)
        norms = walk.input_norms(found.blocks[0], 0, linears)
        for name, linear in linears.items():
            statistics = walk.statistics(found.blocks[0], 0, linear)
            assert torch.allclose(norms[name], statistics.input_norm, rtol=1e-5)
