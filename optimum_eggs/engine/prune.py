"""Pruning block by block, wherever the blocks come from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import BlockProvider, InMemoryBlocks, Walk, batches_of
from ..calibration.context import check_context, check_reads_text, check_vocabulary, text_config
from ..calibration.states import states_in_memory
from ..calibration.windows import windows_digest
from ..config import EGGSConfig
from ..errors import CalibrationError
from ..measure import Meter, devices_of
from ..memory import enough_memory
from ..nn import NMLinear
from ..nn.experts import join_experts
from ..ranks import ALONE, Ranks
from .block import BlockResult, DenseStream, prune_block
from .estimate import announcement, estimate
from .generate import check_generates, generated_windows
from .left_dense import check_left_dense, code_left_dense
from .plan import PrunePlan, make_plan
from .precision import check_float32
from .report import PruneReport
from .rotate import Turn, choose_turn, turn_model
from .tune import check_tunable

logger = logging.getLogger(__name__)


@enough_memory("batch_size", "seq_len", "num_samples", remedy="prune from disk (optimum-cli eggs prune)")
@torch.no_grad()
def prune_model(model: nn.Module, config: EGGSConfig, windows: Tensor, progress: bool | None = None) -> PruneReport:
    """Prune `model` in place: its linear layers become [`NMLinear`].

    Blocks are pruned in order, each on inputs that passed the pruned blocks before it; within a block the layers are
    pruned in the order in which they run, those that read the same tensor on one Gram matrix.

    Memory beyond the model's: the windows' hidden states (up to four times, by what is kept of a block), which
    leave a GPU for the host's memory where they would take more than an eighth of what is free; one batch's
    activations; with a rotation, (d, d) for each norm of the residual stream, d its width, and as much again for each
    layer to be pruned; and for the layer at hand a few (in, in) matrices, some of them in float64, and some eight
    float32 buffers of (out, in). Block tuning takes five float32 copies of a block, error correction one as it is.
    Pruned blocks shrink as they are packed. Experts take up to 1 GiB of Gram matrices at a time, on a GPU up to a
    quarter of what is free.

    Args:
        model: A model in memory, on any device. Its dtype stays; the mathematics runs in float32.
        config: What to do. Its `calibration` is not read here.
        windows: Token ids (windows, tokens), int64, without those that the model is to write.
        progress: Write to stderr what is to be done and about how long it takes, and show a progress bar; or neither.
            Default: the bar only if stderr is a terminal.

    Returns:
        The report.

    Raises:
        EGGSError: the plan or the windows do not fit the model (the model is untouched then), or an activation is
            NaN or infinite, or memory is out (the blocks before are pruned by then; load the model again).
    """
    check_run(model, config, windows)
    plan = make_plan(model, config)
    try:
        turn: Turn | str | None = None
        with Meter(devices_of(model)) as meter:
            blocks = InMemoryBlocks(model, plan.block_list)
            if config.generated_samples:
                with evaluation_mode(model), meter.stage("generation"):
                    count = config.generated_samples
                    made = generated_windows(model, blocks, windows, count, config.seed, progress=progress)
                windows = torch.cat([windows, made])
            if config.rotation:
                with evaluation_mode(model):
                    turn = choose_turn(model, blocks, plan, config, windows, meter, states_in_memory, progress=progress)
                if isinstance(turn, Turn):
                    turn_model(model, plan, turn)
            done = prune_blocks(model, blocks, plan, config, windows, meter, progress)
            with meter.stage("left dense"):
                coded = code_left_dense(model, config)
    except BaseException:
        if not any(isinstance(module, NMLinear) for module in model.modules()):
            join_experts(model)
        raise
    return make_report(plan, config, windows, done, meter, coded, turn)


class Keeper(Protocol):
    """Keeps finished blocks, so that a run that was cut can go on behind them."""

    def __len__(self) -> int:
        """How many blocks are finished."""

    @property
    def results(self) -> list[BlockResult]:
        """What became of them."""

    def restore(self, block: nn.Module, index: int) -> None:
        """Put what finished block `index` came to into the dense one."""

    def keep(self, block: nn.Module, index: int, result: BlockResult) -> None:
        """Block `index` is pruned and packed."""


def check_run(model: nn.Module, config: EGGSConfig, windows: Tensor, ranks: Ranks = ALONE) -> None:
    """Raise unless the windows fit the model and the processes, and its blocks run as the configuration needs."""
    check_reads_text(model)
    ranks.check(len(windows), config.batch_size, config.generated_samples)
    _check_windows(windows, model)
    for steps in ("block_tuning", "rounding_tuning"):
        if getattr(config, steps):
            check_float32(model, f"{steps}={getattr(config, steps)}")
            check_tunable(steps)
    if config.permutation:
        check_float32(model, "permutation=True")
    if config.rotation:
        check_float32(model, "rotation=True")
    if config.generated_samples:
        check_generates(model, f"generated_samples={config.generated_samples}")
    if config.head or config.ignored:
        with evaluation_mode(model):
            check_left_dense(model, config)


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    blocks: BlockProvider,
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    progress: bool | None = None,
    store: Callable[[int, torch.device], MutableSequence[Tensor]] = states_in_memory,
    keeper: Keeper | None = None,
    ranks: Ranks = ALONE,
) -> list[BlockResult]:
    """Prune the blocks that `blocks` provides, in order, as the plan says. Returns what became of each.

    With several `ranks`, all of them call this with the same arguments and get the same result.

    Blocks that the keeper has finished are not pruned again: the windows pass through what it kept.
    """
    done = list(keeper.results) if keeper is not None else []
    with evaluation_mode(model):
        batches = batches_of(windows, config.batch_size, config.short_share, config.seed)
        walk = Walk(blocks, batches, meter, store, ranks)
        stream = DenseStream(walk) if config.follows_dense else None
        hide = ranks.hide_bar(progress)
        announced = progress is False or not ranks.first
        bar = tqdm(range(len(blocks)), desc=f"Pruning to {config.pattern}", unit="block", disable=hide)
        for index in bar:
            block = blocks.materialise(index)
            if keeper is not None and index < len(keeper):
                if stream is not None:
                    stream.advance(block, index)
                    stream.apart |= bool(done[index].layers)
                keeper.restore(block, index)
                walk.advance(block, index)
                plan.layers[index] = {}
            else:
                if not announced and plan.layers[index]:
                    announced = True
                    found = estimate(walk, block, index, plan, config)
                    first = walk.hidden[0]
                    tqdm.write(announcement(model, windows, first, plan, config, found), file=sys.stderr)
                go_on = any(plan.layers[index + 1 :])  # behind the last block to prune, nothing needs to run
                done.append(prune_block(walk, block, index, plan, config, meter, stream, go_on))
                if keeper is not None:
                    keeper.keep(block, index, done[-1])
            blocks.release(index)
            errors = [layer.relative_error for layer in done[index].layers if layer.relative_error is not None]
            if errors:
                bar.set_postfix(error=f"{sum(errors) / len(errors):.4f}")
    return done


def make_report(
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    done: Sequence[BlockResult],
    meter: Meter,
    left_coded: Mapping[str, str] | None = None,
    turn: Turn | str | None = None,
) -> PruneReport:
    """The report of a run, from what became of each block, the codings of what is left dense, and the rotation.

    Raises:
        CalibrationError: no layer was pruned.
    """
    layers = [layer for block in done for layer in block.layers]
    coded = {layer.name: layer.coding for layer in layers if layer.coding is not None} | dict(left_coded or {})
    left_dense = [*plan.left_dense, *(layer for block in done for layer in block.left_dense)]
    if not layers:
        raise CalibrationError(
            f"nothing was pruned: {left_dense[-1].name} was {left_dense[-1].reason}; give more text, or name other "
            "`targets`"
        )
    turned = turn if isinstance(turn, Turn) else None
    listed = {"pruned_modules": {layer.name: layer.pattern for layer in layers}, "coded_modules": coded or None}
    report = PruneReport(
        config=config.to_dict() | listed | {"matrix_norms": turned.matrix_norms if turned else None},
        layers=layers,
        left_dense=left_dense,
        calibration={
            "windows": len(windows),
            "generated": config.generated_samples,
            "seq_len": windows.shape[1],
            "sha256": windows_digest(windows),
        },
        tuning=[block.tuning for block in done if block.tuning is not None],
        rounding=[block.rounding for block in done if block.rounding is not None],
        measurements=meter.summary(),
        rotation=turned.lost if turned else {"reason": turn} if turn else None,
    )
    logger.info("%r", report)
    return report


def _check_windows(windows: Tensor, model: nn.Module) -> None:
    """Raise unless the windows fit the model's vocabulary and its context."""
    if windows.dim() != 2 or not windows.numel():
        raise CalibrationError(f"calibration windows have shape {tuple(windows.shape)}; they must be (windows, tokens)")
    check_vocabulary(model, windows)
    check_context(model, windows.shape[1])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no cache of keys and values; both put back afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    # The halves of an encoder-decoder may have configurations of their own.
    configs = [text_config(model), *(getattr(module, "config", None) for module in model.modules())]
    distinct: dict[int, Any] = {id(part): part for part in configs if hasattr(part, "use_cache")}
    cached = [(part, part.use_cache) for part in distinct.values()]
    model.eval()
    for part, _ in cached:
        part.use_cache = False
    try:
        yield
    finally:
        for name, module in model.named_modules():  # packed layers are new, and experts that were split
            module.training = training.setdefault(name, training[name.rpartition(".")[0]])
        for part, use_cache in cached:
            part.use_cache = use_cache
