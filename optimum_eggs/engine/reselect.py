"""Masks that are chosen again while a block is tuned, by weights that move whether they are kept or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import dense_weight
from ..nn.dense import is_conv1d

_SHARE = 0.6  # of the steps, in which masks move; the rest tunes what they have come to


@dataclass(frozen=True)
class Reselection:
    """How often masks are chosen again, and by what.

    Attributes:
        every: Steps from one time to the next.
        choose: Score (out, in) -> mask (out, in), under the floor.
        norms: Pruned layer -> ‖x_j‖ of its inputs (in,).
    """

    every: int
    choose: Callable[[Tensor], Tensor]
    norms: Mapping[nn.Module, Tensor]


class MovingMasks:
    """The masks of a block's layers, and beside each layer's weight one that moves where the mask prunes it too.

    The gradient passes straight through the mask to all weights (Huang et al., *Pruning Large Language Models with
    Semi-Structural Adaptive Sparse Training*, 2024). Those pruned begin at zero; where |w|·‖x‖ of one has grown beyond
    that of a weight kept, it takes that one's place. The block computes with zeros off the mask throughout.

    Args:
        masks: Pruned layer -> mask (out, in), on the layer's device; changed in place.
        how: When they are chosen again, and by what.
        steps: Of the tuning.
    """

    def __init__(self, masks: Mapping[nn.Module, Tensor], how: Reselection, steps: int) -> None:
        self._masks, self._how, self._last = masks, how, int(_SHARE * steps)
        self._scales = {module: _scale(norm) for module, norm in how.norms.items()}
        self._weights = {id(module.weight): module.get_parameter("weight").detach().clone() for module in masks}

    def weight(self, parameter: Tensor) -> Tensor:
        """What moves in the place of a parameter; that itself, where it is not the weight of a pruned layer."""
        return self._weights.get(id(parameter), parameter)

    def open(self, step: int) -> bool:
        """Whether masks may still change after this step, counted from 0."""
        return step < self._last

    def apply(self, step: int) -> None:
        """Behind this step: choose, if it is time, and give the block what it computes with."""
        chosen = self.open(step) and (step + 1) % self._how.every == 0
        for module, mask in self._masks.items():
            parameter = module.get_parameter("weight")
            moved = self._weights[id(parameter)]
            weight = moved.t() if is_conv1d(module) else moved  # (out, in)
            if chosen:
                # what is not finite shows in the error at the end, and is undone then
                mask.copy_(self._how.choose((weight.abs() * self._scales[module]).nan_to_num_()))
            torch.mul(weight, mask, out=dense_weight(module))


def _scale(norm: Tensor) -> Tensor:
    """The norms (in,) of a layer's inputs, none of them zero: a kept weight must not be as small as a pruned one."""
    least = 1e-6 * norm.amax()
    return torch.where(least > 0, norm.clamp_min(least), 1.0)
