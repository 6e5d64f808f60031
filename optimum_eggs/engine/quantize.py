"""The values of a packed model to integers, block by block, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import InMemoryBlocks, Walk
from ..calibration.blocks import find_block_list
from ..calibration.states import states_in_memory
from ..config import EGGSConfig
from ..errors import ConfigError, ModelError
from ..measure import Meter
from ..memory import enough_memory
from ..nn import CodedLinear, NMLinear, packed_layers, pattern_of
from .block import DenseStream
from .head import code_head, outer_modules
from .prune import check_run, evaluation_mode
from .rounding import RoundedLayer, code_layer, round_block
from .tune import BlockTuning, tune_block


@enough_memory("batch_size", "seq_len", "num_samples")
@torch.no_grad()
def quantize_model(
    model: Any, config: EGGSConfig, windows: Tensor | None, meter: Meter, progress: bool | None = None
) -> tuple[dict[str, str], list[BlockTuning]]:
    """Store the values of the packed layers of `model` as integers, in place, under the masks that they have.

    As when a model is pruned with `values`, but what a block is tuned towards is what it gave before.

    Args:
        model: A packed model in memory, its values floats.
        config: Its `values`, `value_group`, `rounding`, `rounding_tuning` and `head`.
        windows: Token ids (windows, tokens), int64; not needed to round to the nearest without tuning.
        meter: Counts the seconds.
        progress: Show a progress bar on stderr. Default: if it is a terminal.

    Returns:
        Module -> coding, and how each block was tuned.

    Raises:
        ConfigError: neither `values` nor `head` is given; or windows are needed.
        ModelError: there is no packed layer, or one holds integers already. The model is as it was.
    """
    layers = packed_layers(model)
    if config.values is None and config.head is None:
        raise ConfigError("values=None and head=None: nothing is to be stored in integers; give values='int8'")
    if not layers:
        raise ModelError("the model has no packed layer; prune it first, with values='int8' in the same command")
    coded = next((name for name, layer in layers.items() if isinstance(layer, CodedLinear)), None)
    if coded is not None:
        raise ModelError(f"{coded} holds integers already; start from the packed model with floats")
    if config.head is not None:
        outer_modules(model)
    codings: dict[str, str] = {}
    tuned: list[BlockTuning] = []
    if config.values is not None:
        codings, tuned = _round_blocks(model, layers, config, windows, meter, progress)
    if config.head is not None:
        with meter.stage("head"):
            codings |= code_head(model, config.head_coding())
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
        walk = (
            None if windows is None or not passes else Walk(blocks, windows, config.batch_size, meter, states_in_memory)
        )
        stream = DenseStream(walk) if walk is not None and config.rounding_tuning else None
        quiet = None if progress is None else not progress
        for index in tqdm(range(len(blocks)), desc=f"Rounding to {config.values}", unit="block", disable=quiet):
            block, prefix = blocks.materialise(index), f"{block_list.block_name(index)}."
            own = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            if stream is not None:
                stream.advance(block, index)
            rounded, tuning = _round_block(walk, block, index, prefix, own, config, meter, stream)
            if tuning is not None:
                tuned.append(tuning)
            if walk is not None:
                walk.advance(block, index)
            for name, layer in rounded.items():
                codings[name] = str(layer.coding)
                path = name.removeprefix(prefix)
                packed = NMLinear.from_linear(block.get_submodule(path), pattern_of(own[name]), layer.mask)
                block.set_submodule(path, code_layer(packed, layer))
                del layers[name]
            blocks.release(index)
    return codings, tuned


def _round_block(
    walk: Walk | None,
    block: nn.Module,
    index: int,
    prefix: str,
    layers: dict[str, NMLinear | CodedLinear],
    config: EGGSConfig,
    meter: Meter,
    stream: DenseStream | None,
) -> tuple[dict[str, RoundedLayer], BlockTuning | None]:
    """Make the layers of a block dense, zeros in place, and round them."""
    masks: dict[nn.Module, Tensor] = {}
    dense: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        dense[name] = layer.to_original()
        masks[dense[name]] = layer.mask()
        block.set_submodule(name.removeprefix(prefix), dense[name])
    rounded = round_block(walk, block, index, prefix, dense, masks, config, meter)
    tuning = None
    if stream is not None and walk is not None and rounded:
        with meter.stage("tuning"):
            coded = {dense[name]: layer for name, layer in rounded.items()}
            steps, rate = config.rounding_tuning, config.tuning_lr
            tuning = tune_block(walk, block, index, masks, stream.hidden, steps, rate, config.seed, coded)
    return rounded, tuning
