"""Reordering a layer's inputs for free: the new order is folded into the rows of the layers that produce them.

An order of the inputs costs nothing at run time where all that lies between two layers works channel by channel:

- an MLP: `down(act(gate(x)) * up(x))` stays the same if the columns of `down` and the rows of `gate` and `up` are
  reordered alike;
- attention: a head's output is a sum of its values over tokens, weighted by token, so the rows of `v` within a head
  and the columns of `o` for that head may be reordered alike. Query heads that share a value head share its order.

Layers are found by name and shape; that the block is really built that way is checked by running it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..masks.permutation import channel_order, kept_score
from ..nn import dense_weight, is_dense_linear
from ..pattern import NMPattern

logger = logging.getLogger(__name__)

# Consumer and producers, by their names below the module that holds them all. The first line whose producers all exist
# is the one. A single producer may be a fused one of twice the height: the consumer takes the product of its halves.
_MLP = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),
    ("down_proj", ("up_proj",)),
    ("fc2", ("fc1",)),
    ("c_proj", ("c_fc",)),
    ("dense_4h_to_h", ("dense_h_to_4h",)),
    ("output.dense", ("intermediate.dense",)),
)
# The same for attention, with what the producer's rows are: values; the queries, keys and values of all heads, one
# kind after the other; or for one key/value head after the other its queries, key and value.
_ATTENTION = (
    ("o_proj", ("v_proj",), "v"),
    ("out_proj", ("v_proj",), "v"),
    ("output.dense", ("self.value",), "v"),
    ("o_proj", ("qkv_proj",), "qkv"),
    ("c_proj", ("c_attn",), "qkv"),
    ("dense", ("query_key_value",), "qkv by head"),
)


@dataclass(frozen=True)
class Rows:
    """Rows of a layer, by full dotted name: those of head h begin at `offset + h * stride`."""

    name: str
    offset: int
    stride: int


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs can be reordered, and the rows that are reordered with them.

    The consumer's inputs are heads × copies × size channels, in that nesting: each of `heads` value heads, of `size`
    channels, is read by `copies` query heads. An MLP is one head that is read once.

    Args:
        consumer: Full dotted name of the layer whose columns are reordered.
        producers: The rows that give its inputs; a fused layer may be there twice.
        heads: Number of value heads. Each has its own order.
        copies: Number of query heads that share a value head.
        size: Number of channels of a head.
    """

    consumer: str
    producers: tuple[Rows, ...]
    heads: int
    copies: int
    size: int


def find_folds(block: nn.Module, prefix: str, names: Iterable[str]) -> list[Fold]:
    """The layers of a block whose inputs can be reordered. No two folds move the same rows or columns.

    Args:
        block: The block.
        prefix: Full dotted name of the block, with a dot at the end (`"model.layers.0."`).
        names: Full dotted names of the dense linear layers to be pruned in it. Only these are consumers; producers are
            any dense linear layers of the block.

    Returns:
        The folds, in the order of `names`. Layers whose producers cannot be found, or have an unexpected shape, have
        none.
    """
    modules = dict(block.named_modules(remove_duplicate=False))
    folds: list[Fold] = []
    for name in names:
        width = _shape(modules[name.removeprefix(prefix)])[1]
        fold = _mlp_fold(modules, prefix, name, width) or _attention_fold(modules, prefix, name, width)
        folds += [fold] if fold and width else []
    return folds


def find_head_folds(block: nn.Module, prefix: str, names: Iterable[str]) -> list[Fold]:
    """Those of [`find_folds`] that are an attention's, from v to o: all between them is linear, token by token."""
    modules = dict(block.named_modules(remove_duplicate=False))
    found = [_attention_fold(modules, prefix, name, _shape(modules[name.removeprefix(prefix)])[1]) for name in names]
    return [fold for fold in found if fold is not None]


def choose_orders(score: Tensor, fold: Fold, pattern: NMPattern) -> Tensor:
    """An order of the channels of each head, by [`channel_order`].

    The query heads that share an order are more rows of the same problem. Where m does not divide a head's size, groups
    reach over its end and the channels stay as they are.

    score (out, in), of the consumer. Returns (heads, size), int64.

    Raises:
        ShapeError: the score does not have as many inputs as the consumer.
        NumericalError: the score holds NaN or infinite values.
    """
    inputs = fold.heads * fold.copies * fold.size
    if score.dim() != 2 or score.shape[1] != inputs:
        raise ShapeError(f"{fold.consumer}: its score has shape {tuple(score.shape)}; it must be (out, {inputs})")
    if fold.size % pattern.m:
        return torch.arange(fold.size, device=score.device).repeat(fold.heads, 1)
    by_head = score.unflatten(1, (fold.heads, fold.copies, fold.size))
    # time goes with the square of the size, and heads are small
    rounds = 3 if fold.heads * fold.copies == 1 else 10
    return torch.stack([channel_order(by_head[:, head].flatten(0, 1), pattern, rounds) for head in range(fold.heads)])


def column_order(fold: Fold, orders: Tensor) -> Tensor:
    """The order of all inputs of the consumer, (in,), that orders (heads, size) of each head's channels amount to.

    >>> column_order(Fold("o", (), heads=2, copies=2, size=2), torch.tensor([[1, 0], [0, 1]]))
    tensor([1, 0, 3, 2, 4, 5, 6, 7])
    """
    columns = torch.arange(fold.heads * fold.copies * fold.size, device=orders.device)
    columns = columns.view(fold.heads, fold.copies, fold.size)
    return columns.gather(2, orders[:, None].expand_as(columns)).flatten()


@torch.no_grad()
def apply_fold(block: nn.Module, prefix: str, fold: Fold, orders: Tensor) -> None:
    """Reorder the consumer's columns, and the producers' rows and biases to match, in place.

    orders (heads, size): channel `orders[h, i]` of head h moves to place i. The same with `orders.argsort(1)` undoes
    it bit for bit.
    """
    heads = torch.arange(fold.heads, device=orders.device)[:, None]
    places = torch.arange(fold.size, device=orders.device)
    for rows in fold.producers:
        first = rows.offset + heads * rows.stride
        module = block.get_submodule(rows.name.removeprefix(prefix))
        bias = getattr(module, "bias", None)
        for tensor in (dense_weight(module), *(() if bias is None else (bias.detach(),))):
            target, source = (first + places).to(tensor.device), (first + orders).to(tensor.device)
            tensor[target] = tensor[source]
    weight = dense_weight(block.get_submodule(fold.consumer.removeprefix(prefix)))
    weight.copy_(weight[:, column_order(fold, orders).to(weight.device)])


@torch.no_grad()
def permute_block(
    block: nn.Module,
    prefix: str,
    folds: Iterable[Fold],
    score: Callable[[str], Tensor],
    pattern: NMPattern,
    run: Callable[[], Tensor],
) -> dict[str, float]:
    """Reorder inputs within a dense block, in place, so that N:M masks keep more of the score.

    After a fold the block is run again; after those of all experts once, as there may be hundreds. If a consumer or the
    block gives something else than before, as where an architecture does more between the two layers, the fold is
    undone bit for bit and a warning names the layer; of several that were checked together, each is then tried alone.

    Args:
        block: The block, in evaluation mode.
        prefix: Its full dotted name, with a dot at the end.
        folds: Those to apply, of [`find_folds`].
        score: The score (out, in) of a consumer, by full dotted name; called once for each.
        pattern: n kept of every m inputs.
        run: Runs the block on one batch, always the same, and returns its hidden states (..., hidden).

    Returns:
        For each consumer, how much more score the n largest of every m keep, as a fraction of what they kept before; 0
        where no better order was found. Consumers that did not run or whose fold was undone are left out.

    Raises:
        ShapeError, NumericalError: a score does not fit its layer or the pattern, or is not finite.
    """
    folds = list(folds)
    if not folds:
        return {}
    consumers = {fold.consumer: block.get_submodule(fold.consumer.removeprefix(prefix)) for fold in folds}
    before = _outputs(consumers, run)
    gains: dict[str, float] = {}

    def done(moves: Sequence[tuple[Fold, Tensor]]) -> bool:
        nonlocal before
        for fold, orders in moves:
            apply_fold(block, prefix, fold, orders)
        after = _outputs(consumers, run)
        # not the other consumers: rounding may send a token to another expert
        checked = [*(fold.consumer for fold, _ in moves), _BLOCK]
        if all(key in after and same_output(before[key], after[key]) for key in checked):
            before = after
            return True
        for fold, orders in moves:
            apply_fold(block, prefix, fold, orders.argsort(1))
        return False

    for together in _of_experts(folds):
        moves = []
        # An expert that no token is sent to is left out: nothing could be checked. Rounding may send tokens elsewhere.
        for fold in [fold for fold in together if fold.consumer in before]:
            values = score(fold.consumer)
            orders = choose_orders(values, fold, pattern)
            columns = column_order(fold, orders)
            gains[fold.consumer] = 0.0
            if not torch.equal(columns, columns.sort().values):
                gains[fold.consumer] = kept_score(values[:, columns], pattern) / kept_score(values, pattern) - 1
                moves.append((fold, orders))
        if not moves or done(moves):
            continue
        for fold, orders in moves:
            if len(moves) > 1 and done([(fold, orders)]):
                continue
            del gains[fold.consumer]
            producers = " and ".join(dict.fromkeys(rows.name.removeprefix(prefix) for rows in fold.producers))
            logger.warning(
                "%s: its inputs keep their order: with the rows of %s reordered to match, the block computes something "
                "else; this architecture does more between these layers",
                fold.consumer,
                producers,
            )
    return gains


def _of_experts(folds: Iterable[Fold]) -> list[list[Fold]]:
    """Folds in lists of those whose consumers have one name but for numbers, as experts have; others alone."""
    found: dict[str, list[Fold]] = {}
    for fold in folds:
        parts = [part for part in fold.consumer.split(".") if not part.isdecimal()]
        found.setdefault(".".join(parts), []).append(fold)
    return list(found.values())


def same_output(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs (..., features) differ by no more than the rounding of reordered sums.

    The measure is ‖before − after‖ / max(‖before‖, ‖after‖) of each token, averaged over tokens, so that a few tokens
    of huge norm, as residual streams have, do not hide the others. It is about √2 for unrelated outputs.

    The limit is 4 eps(dtype) + 2^10 eps(float32): 0.0001 in float32, 0.004 in float16, 0.03 in bfloat16. First term:
    sums are taken in float32, and rounding each to the dtype moves it by eps at most. Second: a sum of k products
    moves by about √k eps(float32) if reordered, more where it cancels; k is below 2^16. NaN is never the same.
    """
    if before.shape != after.shape:
        return False
    old, new = before.float().flatten(0, -2), after.float().flatten(0, -2)
    tiny, eps = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).eps
    size = torch.maximum(old.norm(dim=1), new.norm(dim=1)).clamp_min(tiny)
    difference = float(((old - new).norm(dim=1) / size).mean())
    return difference <= 4 * torch.finfo(before.dtype).eps + 2**10 * eps


_BLOCK = ""  # stands for the block among the names of its layers


def _outputs(layers: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What the block and some of its layers give in a run, (tokens, features); without layers that see no token."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        # cloned, since what follows may add to it in place
        return lambda module, args, output: seen.setdefault(name, []).append(output.flatten(0, -2).clone())

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    outputs = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: output for name, output in outputs.items() if len(output)} | {_BLOCK: result.flatten(0, -2)}


def _mlp_fold(modules: Mapping[str, nn.Module], prefix: str, name: str, width: int) -> Fold | None:
    path = name.removeprefix(prefix)
    for consumer, producers in _MLP:
        paths = _beside(modules, path, consumer, producers)
        if not paths:
            continue
        heights = [_shape(modules[producer])[0] for producer in paths]
        if heights == [width] * len(paths):
            rows = [Rows(prefix + producer, 0, width) for producer in paths]
        elif heights == [2 * width]:
            rows = [Rows(prefix + paths[0], offset, width) for offset in (0, width)]
        else:
            return None
        return Fold(name, tuple(rows), heads=1, copies=1, size=width)
    return None


def _attention_fold(modules: Mapping[str, nn.Module], prefix: str, name: str, width: int) -> Fold | None:
    path = name.removeprefix(prefix)
    for consumer, producers, layout in _ATTENTION:
        paths = _beside(modules, path, consumer, producers)
        if not paths:
            continue
        height = _shape(modules[paths[0]])[0]
        size = _head_size(modules[paths[0].rpartition(".")[0]], width)
        if not size or width % size or height % size:
            return None
        queries = width // size
        heads = height // size if layout == "v" else (height // size - queries) // 2
        if heads < 1 or queries % heads or height != size * (heads if layout == "v" else queries + 2 * heads):
            return None
        copies = queries // heads
        offset, stride = {"v": (0, 1), "qkv": (queries + heads, 1), "qkv by head": (copies + 1, copies + 2)}[layout]
        return Fold(name, (Rows(prefix + paths[0], offset * size, stride * size),), heads, copies, size)
    return None


def _beside(modules: Mapping[str, nn.Module], path: str, consumer: str, producers: tuple[str, ...]) -> list[str] | None:
    """The paths of `producers`, if `path` is that of such a `consumer` and they exist beside it."""
    parent = path.removesuffix(consumer)
    if parent == path or (parent and not parent.endswith(".")):
        return None
    paths = [parent + producer for producer in producers]
    return paths if all(producer in modules for producer in paths) else None


def _head_size(attention: nn.Module, width: int) -> int | None:
    """The number of channels of a value head, or None if it cannot be told. width: that of all query heads' outputs."""
    config = getattr(attention, "config", None)
    if getattr(config, "num_kv_shared_layers", None):
        return None  # a later block may read this one's values, and running this block would not show it
    for key in ("v_head_dim", "head_dim", "attention_head_size", "head_size"):
        if getattr(attention, key, None):
            return int(getattr(attention, key))
    for holder, key in ((attention, "num_heads"), (attention, "num_attention_heads"), (config, "num_attention_heads")):
        if getattr(holder, key, None):
            return width // int(getattr(holder, key))
    return None


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense linear layer in memory, or (0, 0) of anything else."""
    if not is_dense_linear(module):
        return 0, 0
    weight = dense_weight(module)
    return (0, 0) if weight.device.type == "meta" else (weight.shape[0], weight.shape[1])
