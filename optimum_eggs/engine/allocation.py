"""Layerwise allocation: the same budget of kept weights, spent where it lowers the error most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence

from torch import Tensor
from tqdm.auto import tqdm

from ..calibration import BlockProvider, Walk
from ..config import EGGSConfig
from ..importance import importance_score
from ..masks import topn_mask
from ..measure import Meter
from ..nn import dense_weight
from ..pattern import NMPattern
from ..ranks import ALONE, Ranks
from ..update import masked_refit, relative_error
from .inputs import layers_with_inputs
from .plan import PrunePlan

_REFIT_STEPS = 5  # enough to rank layers


def allocate(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], pattern: NMPattern
) -> dict[str, NMPattern]:
    """Choose n for each layer, greedily by error per parameter, m fixed and n:m on average over all weights.

    Every layer begins at the least n it may have; again and again, the layer whose error falls most for a weight more
    gets one more of every m, as long as the budget lasts.

    Args:
        errors: Layer -> n -> its error at n:m.
        sizes: Layer -> number of its weights.
        pattern: The average.

    Returns:
        Layer -> pattern. The weights kept are at most those of `pattern` everywhere.

    >>> errors = {"a": {1: 0.9, 2: 0.5, 3: 0.1}, "b": {1: 0.2, 2: 0.1, 3: 0.0}}
    >>> {name: str(chosen) for name, chosen in allocate(errors, {"a": 8, "b": 8}, NMPattern(2, 4)).items()}
    {'a': '3:4', 'b': '1:4'}
    """
    chosen = {name: min(of_layer) for name, of_layer in errors.items()}
    left = sum(size * (pattern.n - chosen[name]) for name, size in sizes.items())
    while True:
        gains = {
            name: (errors[name][n] - errors[name][n + 1]) / sizes[name]
            for name, n in chosen.items()
            if n + 1 in errors[name] and sizes[name] <= left
        }
        if not gains:
            return {name: NMPattern(n, pattern.m) for name, n in chosen.items()}
        name = max(gains, key=lambda key: gains[key])
        chosen[name] += 1
        left -= sizes[name]


def allocate_by_error(
    blocks: BlockProvider,
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    progress: bool | None,
    store: Callable[[], MutableSequence[Tensor]] = list,
    ranks: Ranks = ALONE,
) -> dict[str, NMPattern]:
    """Patterns for all layers of the plan, by their relative errors in the dense model.

    One walk of the dense model; each layer is pruned by score and refitted once for every n it may have, and the sum of
    the relative errors is what is lowered. The model stays as it is.
    """
    walk = Walk(blocks, windows, config.batch_size, meter, store, ranks)
    errors: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    for index in tqdm(range(len(blocks)), desc="Allocating", unit="block", disable=ranks.hide_bar(progress)):
        block, todo = blocks.materialise(index), plan.layers[index]
        prefix = f"{plan.block_list.block_name(index)}."
        for wave in layers_with_inputs(walk, block, index, prefix, todo, config.min_expert_tokens):
            grams = {name: alike.statistics.gram for alike in wave for name in alike.names}
            sizes |= {name: dense_weight(todo[name]).numel() for name in grams}
            with meter.stage("allocation"):
                with ranks.together():
                    mine = ranks.mine({name: sizes[name] for name in grams})
                    found = {k: _errors(dense_weight(todo[k]).float(), grams[k], config) for k in mine}
                errors |= ranks.merge(found)
            grams.clear()  # before the next ones are made
        walk.advance(block, index)
        blocks.release(index)
    return dict.fromkeys(plan.names, config.pattern) | allocate(errors, sizes, config.pattern)


def _errors(weight: Tensor, gram: Tensor, config: EGGSConfig) -> dict[int, float]:
    score = importance_score(config.importance, weight, gram.diagonal().sqrt(), config.exponent)
    errors = {}
    for pattern in config.pattern.allocations():
        mask = topn_mask(score, pattern)
        refitted = masked_refit(weight, mask, gram, config.damping, _REFIT_STEPS)
        errors[pattern.n] = relative_error(weight, refitted, gram)
    return errors
