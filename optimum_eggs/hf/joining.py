"""Products of the same inputs, such as q, k and v, made one call in what `torch.compile` makes of a decoding step."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ..ops import packed_linears
from ..ops.packed_linears import MOST_LAYERS


class JoinProducts(CustomGraphPass):
    """For `torch.compile(options={"post_grad_custom_pre_pass": JoinProducts()})`."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        join_products(graph)

    def uuid(self) -> object:
        """What torch's cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__, packed_linears.__file__))


def join_products(graph: fx.Graph) -> None:
    """Put one `packed_linears` in place of several `packed_linear` of the same inputs, in place.

    Those are joined whose weights are inputs of the graph, not computed in it. A graph that takes tensors by places in
    their memory stays as it is: an output would no longer begin where its memory does.
    """
    single = torch.ops.optimum_eggs.packed_linear.default
    if graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):
        return
    alike: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=single):
        x, *stored, n, m, bits, group = node.args
        stands = all(each is None or each.op == "placeholder" for each in stored)
        if stands and isinstance(node.meta["val"].shape[-1], int):
            alike[x, stored[1] is None, stored[2] is None, n, m, bits, group].append(node)
    for nodes in alike.values():
        for start in range(0, len(nodes) - 1, MOST_LAYERS):
            _join(graph, nodes[start : start + MOST_LAYERS])


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    x, numbers = nodes[0].args[0], nodes[0].args[-4:]
    absent = [None] * (MOST_LAYERS - len(nodes))
    stored = [
        each for of_each in zip(*(node.args[1:-4] for node in nodes), strict=True) for each in (*of_each, *absent)
    ]
    outputs = [node.meta["val"] for node in nodes]
    with graph.inserting_before(nodes[0]):
        joined = graph.call_function(torch.ops.optimum_eggs.packed_linears.default, (x, *stored, *numbers))
        total = sum(each.shape[-1] for each in outputs)
        joined.meta["val"] = outputs[0].new_empty((*outputs[0].shape[:-1], total))
        start = 0
        for node, output in zip(nodes, outputs, strict=True):
            end = start + output.shape[-1]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (joined, -1, start, end))
            part.meta["val"] = joined.meta["val"][..., start:end]
            node.replace_all_uses_with(part)
            start = end
    for node in nodes:
        graph.erase_node(node)
