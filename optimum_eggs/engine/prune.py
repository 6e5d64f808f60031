"""Pruning a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import GramAccumulator, InMemoryBlocks, Walk
from ..calibration.windows import windows_digest
from ..config import EGGSConfig
from ..errors import CalibrationError, NumericalError
from ..masks.certificate import certify
from ..measure import Meter
from ..nn import NMLinear, dense_weight
from ..packing import pack_mask, unpack_mask
from ..update import relative_error
from .plan import PrunePlan, make_plan
from .report import DenseLayer, LayerReport, PruneReport
from .solve import solve_layer

logger = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(model: nn.Module, config: EGGSConfig, windows: Tensor, progress: bool | None = None) -> PruneReport:
    """Prune `model` in place: its linear layers become [`NMLinear`].

    Blocks are pruned in order, each on inputs that passed the pruned blocks before it; within a block the layers are
    pruned in the order in which they run, those that read the same tensor on one Gram matrix.

    Memory beyond the model's: the windows' hidden states, one batch's activations, and for the layer at hand one
    (in, in) Gram matrix and some eight float32 buffers of (out, in). Pruned blocks shrink as they are packed.

    Args:
        model: A model in memory, on any device. Its dtype stays; the mathematics runs in float32.
        config: What to do. Its `calibration` is not read here.
        windows: Token ids (windows, tokens), int64.
        progress: Show a progress bar. Default: if stderr is a terminal.

    Returns:
        The report.

    Raises:
        EGGSError: the plan or the windows do not fit the model (the model is untouched then), or an activation is
            NaN or infinite (the blocks before are pruned by then; load the model again).
    """
    plan = make_plan(model, config)
    _check_windows(windows, model)
    layers: list[LayerReport] = []
    with Meter() as meter, _inference_mode(model):
        blocks = InMemoryBlocks(model, plan.block_list)
        walk = Walk(blocks, windows, config.batch_size, meter)
        bar = tqdm(range(len(blocks)), desc=f"Pruning to {config.pattern}", unit="block", disable=_quiet(progress))
        for index in bar:
            block = blocks.materialise(index)
            done = _prune_block(walk, block, index, plan, config, meter)
            layers += done
            blocks.release(index)
            if done:
                bar.set_postfix(error=f"{sum(layer.relative_error for layer in done) / len(done):.4f}")
    report = PruneReport(
        config=config.to_dict() | {"pruned_modules": {layer.name: layer.pattern for layer in layers}},
        layers=layers,
        left_dense=plan.left_dense,
        calibration={"windows": len(windows), "seq_len": windows.shape[1], "sha256": windows_digest(windows)},
        measurements=meter.summary(),
    )
    logger.info("%r", report)
    return report


@dataclass
class _Solved:
    """A layer that is pruned but not packed yet: its module holds the dense weight with zeros in place."""

    name: str
    module: nn.Module
    mask_bits: Tensor
    relative_error: float
    tokens: int


def _prune_block(
    walk: Walk, block: nn.Module, index: int, plan: PrunePlan, config: EGGSConfig, meter: Meter
) -> list[LayerReport]:
    todo, plan.layers[index] = plan.layers[index], {}  # the plan must not keep the dense layers in memory
    solved: list[_Solved] = []
    for stage in walk.stages(block, index, todo) if todo else []:
        leader = todo[stage[0]]
        statistics = walk.statistics(block, index, leader, dense_weight(leader).shape[1])
        if not statistics.is_finite():
            raise NumericalError(
                f"{stage[0]}: its calibration inputs hold NaN or infinite values; load the model in a wider dtype "
                "(bfloat16 or float32), or look for the first layer that overflows"
            )
        solved += [_prune_layer(name, todo[name], statistics, config, meter) for name in stage]
    walk.advance(block, index)

    reached = {layer.name for layer in solved}
    for name in todo.keys() - reached:
        reason = "not reached by the calibration text, or run more than once in its block"
        plan.left_dense.append(DenseLayer(name, reason, dense_weight(todo[name]).numel()))
        logger.warning("%s: left dense: %s", name, reason)
    prefix = f"{plan.block_list.block_name(index)}."
    return [_pack_layer(layer, block, prefix, index, config, meter) for layer in solved]


def _prune_layer(
    name: str, module: nn.Module, statistics: GramAccumulator, config: EGGSConfig, meter: Meter
) -> _Solved:
    stored = dense_weight(module)
    weight = stored.to(torch.float32)
    mask, pruned = solve_layer(weight, statistics.gram, config, meter)
    with meter.stage("update"):
        pruned = pruned.to(stored.dtype)
        if not bool(torch.isfinite(pruned).all()):
            raise NumericalError(
                f"{name}: the update gave NaN or infinite weights in {stored.dtype}; raise `damping`, or load the "
                "model in a wider dtype"
            )
    with meter.stage("report"):
        error = relative_error(weight, pruned.to(torch.float32), statistics.gram)
    # Written in place, so that the rest of the block runs on it; packed when the block is done.
    stored.copy_(pruned)
    return _Solved(name, module, pack_mask(mask), error, statistics.tokens)


def _pack_layer(
    solved: _Solved, block: nn.Module, prefix: str, index: int, config: EGGSConfig, meter: Meter
) -> LayerReport:
    pattern = config.pattern
    weight = dense_weight(solved.module)
    with meter.stage("pack"):
        mask = unpack_mask(solved.mask_bits, weight.shape[1])
        packed = NMLinear.from_linear(solved.module, pattern, mask)
        block.set_submodule(solved.name.removeprefix(prefix), packed)
    with meter.stage("report"):
        certificate = certify(mask, weight, pattern, extra_bands=(config.band,) if config.min_degree else ())
    out_features, in_features = weight.shape
    return LayerReport(
        solved.name,
        index,
        out_features,
        in_features,
        str(pattern),
        solved.relative_error,
        solved.tokens,
        certificate,
    )


def _check_windows(windows: Tensor, model: nn.Module) -> None:
    """Raise unless the windows fit the model's vocabulary and its context."""
    if windows.dim() != 2 or not windows.numel():
        raise CalibrationError(f"calibration windows have shape {tuple(windows.shape)}; they must be (windows, tokens)")
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise CalibrationError(
            f"calibration token ids run from {low} to {high}, and the model's vocabulary has {vocabulary}; use the "
            "model's own tokenizer"
        )
    context = getattr(text_config, "max_position_embeddings", None)
    if isinstance(context, int) and context > 0 and windows.shape[1] > context:
        raise CalibrationError(
            f"seq_len={windows.shape[1]} is more than the model's context of {context} tokens; lower seq_len"
        )


def _quiet(progress: bool | None) -> bool | None:
    # None lets tqdm decide: no bar where stderr is no terminal
    return None if progress is None else not progress


@contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no cache of keys and values; both put back afterwards."""
    training = model.training
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cached = [(part, part.use_cache) for part in (config, text_config) if hasattr(part, "use_cache")]
    model.eval()
    for part, _ in cached:
        part.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for part, use_cache in reversed(cached):
            part.use_cache = use_cache
