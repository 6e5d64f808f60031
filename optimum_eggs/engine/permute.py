"""The channels of a dense block put into orders that N:M likes better, where that costs nothing afterwards."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..config import EGGSConfig
from ..importance import importance_score
from ..nn import dense_weight
from .fold import find_folds, permute_block
from .inputs import check_finite
from .precision import in_float32


def permute(
    walk: Walk,
    block: nn.Module,
    index: int,
    prefix: str,
    todo: dict[str, nn.Module],
    config: EGGSConfig,
) -> dict[str, float]:
    """Fold better orders of the channels into the dense block; the gain in kept score, by layer."""
    folds = find_folds(block, prefix, todo) if config.permutation else []
    if not folds:
        return {}
    norms = walk.input_norms(block, index, {fold.consumer: todo[fold.consumer] for fold in folds})
    for name, norm in norms.items():
        check_finite(name, bool(torch.isfinite(norm).all()))

    def score(name: str) -> Tensor:
        weight = dense_weight(todo[name]).to(torch.float32)
        return importance_score(config.importance, weight, norms[name], config.exponent)

    # In float32, where a fold that is wrong by little shows.
    run = partial(walk.run, block, index, 0, dtype=torch.float32)
    with walk.meter.stage("permutation"):
        gains: dict[str, float] = {}
        with walk.ranks.together():
            if walk.ranks.first:  # a fold is checked on the windows at hand, so one process decides
                with in_float32(block):
                    gains = permute_block(block, prefix, folds, score, config.pattern, run)
        walk.ranks.copy_from(0, *(parameter.data for parameter in block.parameters()))
        return walk.ranks.gather(gains)[0]
