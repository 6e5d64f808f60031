"""Layers of the same inputs are one call in what is compiled, and nothing else is."""

import mmap

import pytest
import tiny
import torch
import transformers as t
from torch import fx, nn

from optimum_eggs import EGGSConfig, EGGSPruner, compile_generation
from optimum_eggs.hf import joining
from optimum_eggs.hf.joining import join_products
from optimum_eggs.huge_pages import use_huge_pages

SINGLE, JOINT = torch.ops.optimum_eggs.packed_linear.default, torch.ops.optimum_eggs.packed_linears.default


def graph_of(calls):
    """A graph that calls `packed_linear` with what is named: (input, weight) each; and what it is to be called with."""
    graph, values = fx.Graph(), {}
    mode = torch._subclasses.FakeTensorMode()
    for name in sorted({name for call in calls for name in call}):
        value = torch.randn(2, 8) if name in "xy" else torch.randn(3, 8)
        values[name] = value, graph.placeholder(name)
        values[name][1].meta["val"] = mode.from_tensor(value)
    outputs = []
    for x, weight in calls:
        node = graph.call_function(SINGLE, (values[x][1], values[weight][1], None, None, None, 1, 1, 0, 0))
        node.meta["val"] = values[x][1].meta["val"].new_empty(2, 3)
        outputs.append(node)
    graph.output(tuple(outputs))
    return graph, [value for value, _ in values.values()]


@pytest.mark.parametrize("calls", ["xa xb", "xa xb xc", "xa yb xc yd", "xa xb xc xd xe", "xa xb xc xd", "xa yb", "xa"])
def test_products_of_the_same_inputs_are_joined(calls):
    calls = [tuple(call) for call in calls.split()]
    graph, given = graph_of(calls)
    expected = fx.GraphModule(nn.Module(), graph)(*given)
    join_products(graph)
    graph.lint()
    graph.eliminate_dead_code()
    found = fx.GraphModule(nn.Module(), graph)(*given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    left = len(graph.find_nodes(op="call_function", target=SINGLE))
    alone = sum(1 for x in "xy" if sum(call[0] == x for call in calls) % 3 == 1)
    assert left == alone


def test_weights_that_are_computed_stay_alone():
    graph, _ = graph_of([("x", "a"), ("x", "b")])
    first, _ = graph.find_nodes(op="call_function", target=SINGLE)
    with graph.inserting_before(first):
        made = graph.call_function(torch.neg, (first.args[1],))
    first.args = (first.args[0], made, *first.args[2:])
    join_products(graph)
    assert len(graph.find_nodes(op="call_function", target=SINGLE)) == 2


def test_a_graph_that_reads_by_places_in_memory_stays_as_it_is():
    graph, _ = graph_of([("x", "a"), ("x", "b")])
    first, _ = graph.find_nodes(op="call_function", target=SINGLE)
    with graph.inserting_after(first):
        graph.call_function(torch.ops.aten.as_strided.default, (first, (2, 3), (3, 1), 0))
    join_products(graph)
    assert len(graph.find_nodes(op="call_function", target=SINGLE)) == 2


def test_other_patterns_stay_apart():
    graph, _ = graph_of([("x", "a"), ("x", "b")])
    first, _ = graph.find_nodes(op="call_function", target=SINGLE)
    first.args = (*first.args[:5], 2, 4, 0, 0)
    join_products(graph)
    assert len(graph.find_nodes(op="call_function", target=SINGLE)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("values", [None, "int8"])
def test_a_compiled_model_calls_for_q_k_v_and_gate_up_once(monkeypatch, values):
    torch._dynamo.reset()
    counts = []

    def counted(graph):
        join_products(graph)
        counts.append([len(graph.find_nodes(op="call_function", target=each)) for each in (SINGLE, JOINT)])

    monkeypatch.setattr(joining, "join_products", counted)
    monkeypatch.setattr(joining.JoinProducts, "uuid", lambda _: None)  # nothing from torch's cache
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = t.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=tiny.VOCABULARY, pad_token_id=0)
    pruner = EGGSPruner(t.Qwen2ForCausalLM(config).eval(), tiny.make_tokenizer())
    settings = EGGSConfig("2:4", preset="fast", num_samples=8, seq_len=16, band=8, values=values)
    pruner.prune(settings, calibration=tiny.make_windows(8, 16))
    model = pruner.model
    ids, greedy = tiny.make_windows(2, 12), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **greedy)
    assert torch.equal(compile_generation(model).generate(ids, **greedy), expected)
    assert counts[0][1] == 2 * 2  # of two layers: q, k, v; gate, up
    assert counts[0][0] in (2 * 2, 2 * 2 + 1)  # o, down; the head, where a kernel multiplies it


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="weights are moved on Linux alone")
def test_neighbours_are_one_matrix_in_huge_pages():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(24, 5), nn.Linear(24, 3)
            self.o, self.other = nn.Linear(24, 16), nn.Linear(16, 24)

    torch.manual_seed(0)
    layer = Attention()
    expected = [each.clone() for each in layer.parameters()]
    use_huge_pages(layer)
    for one, other in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(one, other)
    assert layer.k.weight.data_ptr() == layer.q.weight.data_ptr() + layer.q.weight.nbytes
    assert layer.k.bias.data_ptr() == layer.q.bias.data_ptr() + layer.q.bias.nbytes
