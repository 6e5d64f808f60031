"""One layer of a block: pruned in place, and what is known of it until it is packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import GramAccumulator
from ..config import EGGSConfig
from ..errors import NumericalError
from ..importance import importance_score
from ..masks import Shortfall, shortfall, topn_mask
from ..masks.certificate import Certificate
from ..measure import Meter
from ..nn import dense_weight
from ..packing import pack_mask, unpack_mask
from ..packing.layout import meta_width
from ..pattern import NMPattern
from ..ranks import ALONE, Ranks
from ..update import Problem
from ..update.objective import energies, ratio
from .inputs import LayersAlike
from .report import LayerReport
from .solve import own_rows, solve_layer


@dataclass
class SolvedLayer:
    """What is known of a layer that is pruned but not packed yet: its module holds the dense weight, zeros in place.

    `rows` are those that each process solves. Until they `exchange` them, `mask_bits` (out, in/8) holds the process's
    own, and `energy`, of `update.objective.energies`, is that of these.
    """

    name: str
    in_features: int
    pattern: NMPattern
    mask_bits: Tensor
    min_degree: int
    band: int
    rows: list[slice]
    energy: Tensor
    tokens: int
    permutation_gain: float | None
    scores_alone: Shortfall | None
    weights_alone: bool
    damping: float | None

    def mask(self) -> Tensor:
        """Boolean (out, in)."""
        return unpack_mask(self.mask_bits, self.in_features)

    def exchange(self, weight: Tensor, ranks: Ranks) -> None:
        """Get from the other processes what they solved of the layer; weight (out, in) is its module's."""
        ranks.add(self.energy)
        for rank, part in enumerate(self.rows):
            ranks.copy_from(rank, weight[part], self.mask_bits[part])

    def report(self, block: int, certificate: Certificate, coding: str | None = None) -> LayerReport:
        """The layer's part of the report, once it is packed, with the coding of its values."""
        return LayerReport(
            self.name,
            block,
            len(self.mask_bits),
            self.in_features,
            str(self.pattern),
            ratio(self.energy),
            self.tokens,
            certificate,
            self.min_degree,
            self.band,
            self.permutation_gain,
            self.scores_alone,
            self.weights_alone,
            self.damping,
            coding=coding,
        )


def prune_layer(
    name: str,
    module: nn.Module,
    alike: LayersAlike,
    problem: Problem,
    config: EGGSConfig,
    meter: Meter,
    permutation_gain: float | None,
    ranks: Ranks = ALONE,
    missing: Tensor | None = None,
) -> SolvedLayer:
    """Prune the layer called `name` in place, on the statistics of its inputs and the problem that they are.

    `missing` is what its own rows no longer give, as `corrected_target` takes it.

    Several `ranks` solve whole bands of its rows each, and then `exchange` them.

    Raises:
        NumericalError: no finite weights were found.
    """
    stored, statistics, pattern = dense_weight(module), alike.statistics, config.pattern
    weight = stored.to(torch.float32)
    rows = own_rows(len(weight), config, ranks)
    own = rows[ranks.rank]
    found = solve_layer(name, weight, problem, config, meter, own, ranks, missing)
    with meter.stage("update"):
        pruned = found.weight.to(stored.dtype)
        if not bool(torch.isfinite(pruned).all()):
            raise NumericalError(
                f"{name}: the update gave NaN or infinite weights in {stored.dtype}; raise `damping`, or load the "
                "model in a wider dtype"
            )
    with meter.stage("report"):
        energy = energies(found.target, pruned.to(torch.float32), statistics.gram)
        scores_alone = _scores_alone(weight, statistics, config)
    # Written in place, so that the rest of the block runs on it; packed when the block is done.
    stored[own] = pruned
    mask_bits = torch.zeros(len(weight), meta_width(weight.shape[1]), dtype=torch.uint8)
    mask_bits[own] = pack_mask(found.mask).cpu()
    return SolvedLayer(
        name,
        weight.shape[1],
        pattern,
        mask_bits,
        config.min_degree,
        config.band,
        rows,
        energy.cpu(),
        statistics.tokens,
        permutation_gain,
        scores_alone,
        alike.weights_alone,
        found.damping,
    )


def _scores_alone(weight: Tensor, statistics: GramAccumulator, config: EGGSConfig) -> Shortfall | None:
    """What the largest scores alone would have lacked of the layer's floor."""
    if not config.min_degree:
        return None
    score = importance_score(config.importance, weight, statistics.input_norm, config.exponent)
    return shortfall(topn_mask(score, config.pattern), config.pattern, config.min_degree, config.band)
