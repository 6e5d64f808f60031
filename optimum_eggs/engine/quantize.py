"""The values of a packed model to integers, block by block, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import InMemoryBlocks, Walk, batches_of
from ..calibration.blocks import find_block_list
from ..config import EGGSConfig
from ..errors import ConfigError, ModelError
from ..measure import Meter
from ..memory import enough_memory
from ..nn import CodedLinear, NMLinear, packed_layers, pattern_of
from .block import DenseStream, round_layers
from .left_dense import check_left_dense, code_left_dense
from .prune import check_run, evaluation_mode
from .rounding import check_runs, code_layer
from .tune import BlockTuning


@enough_memory("batch_size", "seq_len", "num_samples")
@torch.no_grad()
def quantize_model(
    model: Any, config: EGGSConfig, windows: Tensor | None, meter: Meter, progress: bool | None = None
) -> tuple[dict[str, str], list[BlockTuning]]:
    """Store the values of the packed layers of `model` as integers, in place, under the masks that they have.

    As when a model is pruned with `values`, but what a block is tuned towards is what it gave before.

    Args:
        model: A packed model in memory, its values floats.
        config: Its `values`, `value_group`, `rounding`, `rounding_tuning`, `head` and `ignored`.
        windows: Token ids (windows, tokens), int64; not needed to round to the nearest without tuning.
        meter: Counts the seconds.
        progress: Show a progress bar on stderr. Default: if it is a terminal.

    Returns:
        Module -> coding, and how each block was tuned.

    Raises:
        ConfigError: none of `values`, `head` and `ignored` is given; or windows are needed.
        ModelError: there is no packed layer, or one holds integers already; the model is as it was. Or its first block
            cannot run with layers of integers.
    """
    layers = packed_layers(model)
    if config.values is None and config.head is None and config.ignored is None:
        raise ConfigError(
            "values=None, head=None and ignored=None: nothing is to be stored in integers; give values='int8'"
        )
    if not layers:
        raise ModelError("the model has no packed layer; prune it first, with values='int8' in the same command")
    coded = next((name for name, layer in layers.items() if isinstance(layer, CodedLinear)), None)
    if coded is not None:
        raise ModelError(f"{coded} holds integers already; start from the packed model with floats")
    if config.head or config.ignored:
        with evaluation_mode(model):
            check_left_dense(model, config)
    codings: dict[str, str] = {}
    tuned: list[BlockTuning] = []
    if config.values is not None:
        codings, tuned = _round_blocks(model, layers, config, windows, meter, progress)
    with meter.stage("left dense"):
        codings |= code_left_dense(model, config)
    return codings, tuned


def _round_blocks(
    model: Any,
    layers: dict[str, NMLinear | CodedLinear],
    config: EGGSConfig,
    windows: Tensor | None,
    meter: Meter,
    progress: bool | None,
) -> tuple[dict[str, str], list[BlockTuning]]:
    passes = config.rounding != "nearest" or config.rounding_tuning > 0
    if passes:
        if windows is None:
            raise ConfigError(
                f"rounding={config.rounding!r} with rounding_tuning={config.rounding_tuning} needs calibration text; "
                "give some, or use rounding='nearest' and rounding_tuning=0"
            )
        check_run(model, config, windows)
    block_list = find_block_list(model, config.block_list)
    blocks = InMemoryBlocks(model, block_list)
    codings: dict[str, str] = {}
    tuned: list[BlockTuning] = []
    with evaluation_mode(model):
        walk = None
        if windows is not None and passes:
            batches = batches_of(windows, config.batch_size, config.short_share, config.seed)
            walk = Walk(blocks, batches, meter)
        stream = DenseStream(walk) if walk is not None and config.rounding_tuning else None
        quiet = None if progress is None else not progress
        for index in tqdm(range(len(blocks)), desc=f"Rounding to {config.values}", unit="block", disable=quiet):
            block, prefix = blocks.materialise(index), f"{block_list.block_name(index)}."
            own = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            if stream is not None:
                stream.advance(block, index)
            dense, masks = _made_dense(block, prefix, own)
            rounded, tuning = round_layers(walk, block, index, prefix, dense, masks, config, meter, stream)
            if tuning is not None:
                tuned.append(tuning)
            if walk is not None:
                if rounded and not codings:
                    check_runs(walk, block, index, prefix, rounded, {name: pattern_of(own[name]) for name in rounded})
                walk.advance(block, index)
            for name, layer in rounded.items():
                codings[name] = str(layer.coding)
                path = name.removeprefix(prefix)
                packed = NMLinear.from_linear(block.get_submodule(path), pattern_of(own[name]), layer.mask)
                block.set_submodule(path, code_layer(packed, layer))
                del layers[name]
            blocks.release(index)
    return codings, tuned


def _made_dense(
    block: nn.Module, prefix: str, layers: Mapping[str, NMLinear | CodedLinear]
) -> tuple[dict[str, nn.Module], dict[nn.Module, Tensor]]:
    """Make packed layers of a block dense, zeros in place: those by full dotted name, and their masks."""
    dense = {name: layer.to_original() for name, layer in layers.items()}
    for name, module in dense.items():
        block.set_submodule(name.removeprefix(prefix), module)
    return dense, {dense[name]: layer.mask() for name, layer in layers.items()}
