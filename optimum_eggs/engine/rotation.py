"""The rotation in which N:M pruning loses least: of the residual stream, and of each value head.

It minimises the share of the importance that a plain N:M mask drops, summed over layers. A weight's importance is what
taking it away costs at least, W²/diag(H⁻¹), H = XXᵀ + λI (Hassibi and Stork, "Optimal brain surgeon", 1993), in the
basis of the rotation: for what reads the stream, W → WR and H⁻¹ → RᵀH⁻¹R; for what writes it, W → RᵀW.

(Learnt rotations that gather importance before pruning: "DenoiseRotator", arXiv 2505.23049, which minimises its entropy
and keeps a matrix for each block.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..masks.topn import topn_mask
from ..pattern import NMPattern

STEPS, RATE = 60, 0.02
_LEAST_RATE = 1e-4
_LARGEST_GRADIENT = 1.0  # in norm, of all parameters together


@dataclass(frozen=True)
class ReaderSample:
    """Of layers that read a norm of the stream: its gains (d,), H⁻¹ (d, d) of what it gives without, some rows of each.

    The rows are (rows, d).
    """

    gains: Tensor
    inverse: Tensor
    weights: list[Tensor]


@dataclass(frozen=True)
class WriterSample:
    """Of a layer that writes the stream: some of its columns (d, columns), and diag(H⁻¹) (columns,) of its inputs."""

    weight: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class HeadSample:
    """Of an attention: v (heads, size, d), o (d, heads, copies, size), H⁻¹ (heads, copies, size, size) of o's inputs.

    Of each head's inputs alone: blocks on the diagonal. `reader`: which of the block's `readers` v is one of.
    """

    reader: int
    values: Tensor
    outputs: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class BlockSample:
    """What is known of a block to choose a rotation by: weights in their own dtype, all else float32."""

    readers: list[ReaderSample]
    writers: list[WriterSample]
    heads: list[HeadSample]

    def to(self, device: torch.device) -> BlockSample:
        """The same on a device."""
        moved = [[_to(each, device) for each in part] for part in (self.readers, self.writers, self.heads)]
        return BlockSample(*moved)

    def weights(self) -> list[Tensor]:
        """All that is turned in a step."""
        of_heads = [part for head in self.heads for part in (head.values, head.outputs)]
        of_readers = [weight for reader in self.readers for weight in reader.weights]
        return [*of_readers, *(writer.weight for writer in self.writers), *of_heads]


def _to(sample: Any, device: torch.device) -> Any:
    """A sample whose tensors are on a device."""
    found = {
        name: value.to(device) if isinstance(value, Tensor) else [each.to(device) for each in value]
        for name, value in vars(sample).items()
        if not isinstance(value, int)
    }
    return replace(sample, **found)


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices, float64, in the host's memory.

    `residual` (d, d); `values`, of each block, one (heads, size, size) for each fold. `lost_before`, `lost_after`: the
    share of the importance that a plain mask drops, as a mean over the layers.
    """

    residual: Tensor
    values: list[list[Tensor]]
    lost_before: float
    lost_after: float


@dataclass
class _Sums:
    """What a step adds up: the loss, how many layers it is of, and gradients."""

    residual: Tensor
    values: list[Tensor]
    loss: float = 0.0
    layers: int = 0


@torch.no_grad()
def learn_rotation(
    samples: Sequence[BlockSample],
    size: int,
    pattern: NMPattern,
    steps: int = STEPS,
    rate: float = RATE,
    step_done: Callable[[float], None] = lambda loss: None,
) -> Rotation:
    """Find the rotation by Adam on the matrices whose Q-factor it is, from the identity; the rate falls as a cosine.

    Args:
        samples: Of all blocks, on one device; of at least one layer.
        size: d, of the stream.
        pattern: n kept of every m inputs.
        steps: Of Adam.
        rate: At first.
        step_done: Called after every step with the share lost before it.
    """
    device = next(weight.device for sample in samples for weight in sample.weights())
    shapes = [(len(head.values), *head.inverse.shape[-2:]) for sample in samples for head in sample.heads]
    parameters = [torch.eye(size, device=device)]
    parameters += [torch.eye(shape[-1], device=device).repeat(shape[0], 1, 1) for shape in shapes]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    first = last = 0.0
    for step in range(steps + 1):
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(step < steps)
            turns = [_orthogonal(parameter) for parameter in parameters]
        sums = _lost([turn.detach() for turn in turns], samples, pattern)
        last = sums.loss / sums.layers
        first = last if step == 0 else first
        if step == steps:
            break
        optimizer.zero_grad()
        torch.autograd.backward(turns, [sums.residual, *sums.values])
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2 + _LEAST_RATE
        optimizer.step()
        step_done(last)
    residual, *values = [_orthogonal(each.detach().to(torch.float64)).cpu().contiguous() for each in parameters]
    rest = iter(values)
    return Rotation(residual, [[next(rest) for _ in sample.heads] for sample in samples], first, last)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Q of QR with a positive diagonal of R, of one matrix or several."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _lost(turns: Sequence[Tensor], samples: Sequence[BlockSample], pattern: NMPattern) -> _Sums:
    """The share lost with the rotations `turns`, the stream's first, and its gradients."""
    residual, rest = turns[0], iter(enumerate(turns[1:]))
    sums = _Sums(torch.zeros_like(residual), [torch.zeros_like(turn) for turn in turns[1:]])
    for sample in samples:
        sides = []
        for reader in sample.readers:
            turned = reader.inverse @ residual
            diagonal = (turned * residual).sum(0)
            total = torch.zeros_like(diagonal)
            for stored in reader.weights:
                weight = stored.to(residual.dtype) * reader.gains
                by_weight, by_diagonal = _dropped(weight @ residual, diagonal, pattern, sums)
                sums.residual.addmm_(weight.T, by_weight)
                total += by_diagonal
            sides.append((turned, diagonal, total))
        for head in sample.heads:
            place, turn = next(rest)
            gains, diagonal = sample.readers[head.reader].gains, sides[head.reader][1]
            by_turn, total = _of_head(head, gains, residual, turn, diagonal, pattern, sums)
            sums.values[place] += by_turn
            sides[head.reader][2].add_(total)
        for turned, _, total in sides:
            sums.residual.addcmul_(turned, 2 * total)
        for writer in sample.writers:
            weight = writer.weight.to(residual.dtype)
            by_weight, _ = _dropped(residual.T @ weight, writer.inverse, pattern, sums)
            sums.residual.addmm_(weight, by_weight.T)
    return sums


def _of_head(
    head: HeadSample, gains: Tensor, residual: Tensor, turn: Tensor, diagonal: Tensor, pattern: NMPattern, sums: _Sums
) -> tuple[Tensor, Tensor]:
    """Add what v and o lose; the gradients by the heads' rotation, and by the diagonal that v's inputs have."""
    heads, size, width = head.values.shape
    values = head.values.to(residual.dtype) * gains
    across = values @ residual
    own = (turn.mT @ across).reshape(heads * size, width)
    by_weight, total = _dropped(own, diagonal, pattern, sums)
    by_weight = by_weight.view(heads, size, width)
    sums.residual.addmm_(values.reshape(-1, width).T, (turn @ by_weight).reshape(-1, width))
    by_turn = across @ by_weight.mT

    written = head.outputs.flatten(1).to(residual.dtype)
    outputs = (residual.T @ written).view_as(head.outputs)
    turned = head.inverse @ turn[:, None]
    inverse = (turned * turn[:, None]).sum(-2)
    read = torch.einsum("dhcs,hst->dhct", outputs, turn).flatten(1)
    by_weight, by_inverse = _dropped(read, inverse.flatten(), pattern, sums)
    by_weight = by_weight.view_as(outputs)
    by_outputs = torch.einsum("dhct,hst->dhcs", by_weight, turn).flatten(1)
    sums.residual.addmm_(written, by_outputs.T)
    by_turn += torch.einsum("dhcs,dhct->hst", outputs, by_weight)
    by_turn += (turned * (2 * by_inverse.view_as(inverse))[:, :, None]).sum(1)
    return by_turn, total


def _dropped(weight: Tensor, inverse: Tensor, pattern: NMPattern, sums: _Sums) -> tuple[Tensor, Tensor]:
    """Add the share that a layer (out, in) loses; its gradients by the weight, and by diag(H⁻¹) (in,).

    As if what the layer has in all were constant.
    """
    importance = weight.square() / inverse
    total = importance.sum()
    dropped = importance.masked_fill_(topn_mask(importance, pattern), 0).div_(
        total.clamp_min(torch.finfo(total.dtype).tiny)
    )
    sums.loss += float(dropped.sum())
    sums.layers += 1
    by_inverse = -dropped.sum(0) / inverse
    return dropped.mul_(2).div_(torch.where(weight == 0, 1, weight)), by_inverse
