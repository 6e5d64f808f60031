"""One layer: statistics in, mask and surviving weights out."""

from __future__ import annotations

from torch import Tensor

from ..config import EGGSConfig
from ..importance import importance_score
from ..masks import diagonal_mask, expander_mask, topn_mask
from ..measure import Meter
from ..update import masked_refit


def solve_layer(weight: Tensor, gram: Tensor, config: EGGSConfig, meter: Meter) -> tuple[Tensor, Tensor]:
    """Mask (out, in) and new weight (out, in), zero off the mask.

    weight (out, in), float32; gram XXᵀ (in, in), float32, of the layer's calibration inputs.
    """
    pattern = config.pattern
    with meter.stage("mask"):
        score = importance_score(config.importance, weight, gram.diagonal().sqrt(), config.exponent)
        if config.selection == "optimal":
            mask = expander_mask(score, pattern, config.min_degree, config.band)
        elif config.selection == "diagonal":
            mask = diagonal_mask(score, pattern, config.min_degree)
        else:
            mask = topn_mask(score, pattern)
    if config.weight_update == "none":
        return mask, weight * mask
    with meter.stage("update"):
        return mask, masked_refit(weight, mask, gram, config.damping, config.refit_steps)
