"""Pruning a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import InMemoryBlocks, Walk
from ..calibration.windows import windows_digest
from ..config import EGGSConfig
from ..errors import CalibrationError
from ..measure import Meter
from .allocation import allocate_by_error
from .block import DenseStream, prune_block
from .plan import make_plan
from .report import LayerReport, PruneReport
from .tune import BlockTuning, check_tunable

logger = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(model: nn.Module, config: EGGSConfig, windows: Tensor, progress: bool | None = None) -> PruneReport:
    """Prune `model` in place: its linear layers become [`NMLinear`].

    Blocks are pruned in order, each on inputs that passed the pruned blocks before it; within a block the layers are
    pruned in the order in which they run, those that read the same tensor on one Gram matrix.

    Memory beyond the model's: the windows' hidden states (twice with block tuning, up to four times with error
    correction), one batch's activations, and for the layer at hand a few (in, in) matrices, some of them in float64,
    and some eight float32 buffers of (out, in). Block tuning takes five float32 copies of a block, error correction one
    copy. Pruned blocks shrink as they are packed.

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
    if config.block_tuning:
        check_tunable(model, -(-len(windows) // config.batch_size), config.batch_size)
    layers: list[LayerReport] = []
    tuning: list[BlockTuning] = []
    with Meter() as meter, evaluation_mode(model):
        if config.allocation == "error":
            plan.patterns = allocate_by_error(model, plan, config, windows, meter, progress)
        blocks = InMemoryBlocks(model, plan.block_list)
        walk = Walk(blocks, windows, config.batch_size, meter)
        stream = DenseStream(walk) if _needs_dense_stream(config) else None
        bar = tqdm(range(len(blocks)), desc=f"Pruning to {config.pattern}", unit="block", disable=_quiet(progress))
        for index in bar:
            block = blocks.materialise(index)
            done = prune_block(walk, block, index, plan, config, meter, stream)
            layers += done.layers
            tuning += [done.tuning] if done.tuning else []
            blocks.release(index)
            if done.layers:
                bar.set_postfix(error=f"{sum(layer.relative_error for layer in done.layers) / len(done.layers):.4f}")
    report = PruneReport(
        config=config.to_dict() | {"pruned_modules": {layer.name: layer.pattern for layer in layers}},
        layers=layers,
        left_dense=plan.left_dense,
        calibration={"windows": len(windows), "seq_len": windows.shape[1], "sha256": windows_digest(windows)},
        tuning=tuning,
        measurements=meter.summary(),
    )
    logger.info("%r", report)
    return report


def _needs_dense_stream(config: EGGSConfig) -> bool:
    return bool(config.error_correction) or bool(config.block_tuning and config.tuning_target == "dense")


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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
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
