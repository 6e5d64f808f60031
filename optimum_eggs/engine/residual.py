"""A rotation of the residual stream, folded into the weights that read it and those that write it.

A model whose blocks add to one stream, x ← x + f(norm(x)), computes the same in any orthogonal basis of it, where norms
divide by the length alone: gains go into the layers behind them, W ← W·diag(γ)·R for what reads the stream, W ← RᵀW for
what writes it, E ← E·R for the embeddings. The values of a head may be turned likewise between v and o, each value head
by its own rotation. Nothing is left to compute for it but, where the head shares the embeddings' weight, the last
norm's gains in the new basis (`MatrixNorm`).

(Ashkboos et al., "SliceGPT", arXiv 2401.15024, section 3; "QuaRot", arXiv 2404.00456.)

Layers are found by what they read when the block runs; that a block is really built that way is checked by turning it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import BlockList
from ..calibration.hooks import hooked, input_of
from ..errors import ModelError, with_article
from ..nn import dense_weight, is_dense_linear
from ..nn.norm import MatrixNorm, rms_eps, times
from .fold import Fold, find_head_folds, same_output


@dataclass(frozen=True)
class Readers:
    """A norm of the stream, and the linear layers that read what it gives, by name within the block."""

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class BlockParts:
    """What of a block touches the stream, by name within the block; `heads` are the folds from v to o."""

    readers: tuple[Readers, ...]
    writers: tuple[str, ...]
    heads: tuple[Fold, ...]


@dataclass(frozen=True)
class OutsideParts:
    """What outside the blocks touches the stream, by dotted name; `head` is None where it is the embeddings' weight."""

    embedding: str
    norm: str
    head: str | None


def find_block_parts(block: nn.Module, size: int, run: Callable[[], Any]) -> BlockParts:
    """What of a dense block touches a stream of `size` channels; `run` runs the block on any hidden states.

    Raises:
        ModelError: it cannot be turned; the message says why.
    """
    modules = dict(block.named_modules())
    linears = {name: module for name, module in modules.items() if is_dense_linear(module)}
    norms = {name: module for name, module in modules.items() if rms_eps(module) and _width(module) == size}
    held = {id(parameter) for module in (*linears.values(), *norms.values()) for parameter in module.parameters()}
    others = [
        name
        for name, parameter in block.named_parameters()
        if id(parameter) not in held and (parameter.dim() > 1 or parameter.shape[0] % size == 0)
    ]
    if others:
        raise ModelError(f"{others[0]} is no linear layer, and no RMS norm with gains alone")
    read = _read_by(linears, norms, run)
    if not norms or not all(read.values()):
        name = next((name for name, found in read.items() if not found), "the block")
        raise ModelError(f"{name} is followed by no linear layer" if norms else "it has no RMS norm")
    readers = {name for found in read.values() for name in found}
    writers = [name for name in linears if name not in readers and len(dense_weight(linears[name])) == size]
    lost = next((name for name in linears if name not in readers and name not in writers), None)
    if lost is not None:
        raise ModelError(f"{lost} neither reads a norm of the residual stream nor writes to the stream")
    heads = find_head_folds(block, "", writers)
    return BlockParts(tuple(Readers(norm, tuple(found)) for norm, found in read.items()), tuple(writers), tuple(heads))


def _read_by(
    linears: dict[str, nn.Module], norms: dict[str, nn.Module], run: Callable[[], Any]
) -> dict[str, list[str]]:
    """The linear layers that read what each norm gives, in a run of the block."""
    given: dict[str, Tensor] = {}  # kept, so that no address comes twice
    read: dict[str, list[str]] = {name: [] for name in norms}

    def note_norm(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.update({name: output})

    def note_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            for norm, output in given.items():
                if x.data_ptr() == output.data_ptr() and x.shape == output.shape:
                    read[norm].append(name)

        return hook

    handles = [module.register_forward_hook(note_norm(name)) for name, module in norms.items()]
    try:
        with torch.no_grad(), hooked({module: note_linear(name) for name, module in linears.items()}):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return read


def find_outside_parts(model: Any, block_list: BlockList) -> OutsideParts:
    """What outside the blocks touches the stream.

    Raises:
        ModelError: more than embeddings, one RMS norm and an output head does, or less.
    """
    prefix = f"{block_list.name}."
    modules = {name: module for name, module in model.named_modules() if not f"{name}.".startswith(prefix)}
    names = {id(module): name for name, module in modules.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ModelError(f"its embeddings are {with_article(type(embedding).__name__)}, no nn.Embedding")
    if head is None or not is_dense_linear(head):
        raise ModelError("it has no output head that is a linear layer")
    holders = {name: module for name, module in modules.items() if list(module.parameters(recurse=False))}
    norms = [name for name, module in holders.items() if rms_eps(module) and _width(module) == embedding.embedding_dim]
    rest = [name for name, module in holders.items() if module is not embedding and module is not head]
    if len(norms) != 1 or rest != norms:
        other = next((name for name in rest if name not in norms), "no RMS norm" if not norms else norms[1])
        raise ModelError(f"{other} lies outside the blocks, beside embeddings, one RMS norm and the head")
    tied = head.get_parameter("weight") is embedding.weight
    return OutsideParts(names[id(embedding)], norms[0], None if tied else names[id(head)])


@torch.no_grad()
def fold_block(block: nn.Module, parts: BlockParts, residual: Tensor, values: Sequence[Tensor]) -> None:
    """Turn a dense block in place.

    residual (d, d); values, one (heads, size, size) for each of `parts.heads`; all orthogonal and float64, and so are
    all products.
    """
    for readers in parts.readers:
        gains = block.get_submodule(readers.norm).get_parameter("weight").detach()
        turn = gains.to(residual)[:, None] * residual
        for name in readers.linears:
            weight = dense_weight(block.get_submodule(name))
            weight.copy_(weight.to(residual) @ turn)
        gains.fill_(1)
    for name in parts.writers:
        for tensor in _weight_and_bias(block.get_submodule(name)):
            tensor.copy_(residual.T @ tensor.to(residual))
    for fold, turns in zip(parts.heads, values, strict=True):
        for tensor in _weight_and_bias(block.get_submodule(fold.producers[0].name)):
            for rows, turn in zip(value_rows(fold), turns, strict=True):
                tensor[rows] = (turn.T @ tensor[rows].to(turn)).to(tensor.dtype)
        weight = dense_weight(block.get_submodule(fold.consumer)).unflatten(1, (fold.heads, fold.copies, fold.size))
        weight.copy_(torch.einsum("ohcs,hst->ohct", weight.to(turns), turns))


def _weight_and_bias(module: nn.Module) -> list[Tensor]:
    bias = getattr(module, "bias", None)
    return [dense_weight(module), *(() if bias is None else (bias.detach(),))]


def value_rows(fold: Fold) -> list[slice]:
    """The rows of the producer of values, head by head."""
    (rows,) = fold.producers
    starts = (rows.offset + head * rows.stride for head in range(fold.heads))
    return [slice(start, start + fold.size) for start in starts]


@torch.no_grad()
def check_turns(
    block: nn.Module, parts: BlockParts, hidden: Tensor, run: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Turn a copy of a block at random, and raise unless it computes the same.

    Args:
        block: The block, in float32.
        parts: Of it.
        hidden: Hidden states (..., d) before it.
        run: Runs a block on hidden states, and returns what it gives.

    Raises:
        ModelError: it does not.
    """
    size = hidden.shape[-1]
    residual, values = random_turns(parts, size, hidden.device)
    turned = copy.deepcopy(block)
    fold_block(turned, parts, residual, values)
    wide = hidden.to(torch.float64)
    before = run(block, hidden).to(torch.float64) - wide  # the stream itself may be much larger than what is added
    after = run(turned, (wide @ residual).to(hidden.dtype)).to(torch.float64) @ residual.T - wide
    if not same_output(before.float(), after.float()):
        raise ModelError("turned, a block computes something else: it does more than its layers and norms show")


def random_turns(parts: BlockParts, size: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Orthogonal matrices to turn a block by, of one seed: (d, d), and one (heads, size, size) for each value fold."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(drawn)[0].to(device)

    return orthogonal(size, size), [orthogonal(fold.heads, fold.size, fold.size) for fold in parts.heads]


def turned_outside(parts: OutsideParts, name: str, value: Tensor, residual: Tensor, gains: Tensor) -> Tensor:
    """What a weight outside the blocks, by dotted name, is in the new basis: that of the last norm a matrix, if tied.

    residual (d, d), orthogonal, and gains (d,) of the last norm, both float64.
    """
    if name == f"{parts.embedding}.weight":
        return times(value, residual)
    if parts.head is not None and name == f"{parts.head}.weight":
        return times(value, gains[:, None] * residual)
    if name != f"{parts.norm}.weight":
        return value
    if parts.head is not None:
        return torch.ones_like(value)
    return (residual.T @ (gains[:, None] * residual)).to(value.dtype)


@torch.no_grad()
def fold_outside(model: Any, parts: OutsideParts, residual: Tensor, gains: Tensor) -> None:
    """Turn what lies outside the blocks, in place. Arguments as of [`turned_outside`]."""
    norm = model.get_submodule(parts.norm)
    for path in filter(None, (parts.embedding, parts.head, parts.norm)):
        weight = model.get_submodule(path).get_parameter("weight").detach()
        turned = turned_outside(parts, f"{path}.weight", weight, residual, gains)
        if turned.shape == weight.shape:
            weight.copy_(turned)
        else:
            made = MatrixNorm.in_place_of(norm)
            made.weight.detach().copy_(turned)
            model.set_submodule(path, made)


def _width(norm: nn.Module) -> int:
    return norm.get_parameter("weight").shape[0]
