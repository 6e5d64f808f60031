"""How long a pruning run will take, and how much memory, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..calibration.states import StatesOnDisk
from ..config import EGGSConfig
from ..measure import finish
from ..nn import dense_weight
from .inputs import expert_waves, kept_parts, wave_bytes
from .plan import PrunePlan
from .precision import bfloat16_products, in_float32
from .rotation import STEPS, BlockSample
from .tune import judged_batches

# Products of a layer's weight (out, in) with its Gram matrix (in, in) that a solver costs, as counted or timed on two
# cores.
_PRODUCTS = {"score": 1, "sparsegpt": 3, "admm": 50}
FACTORISATION = {"score": 0, "sparsegpt": 4, "admm": 12}
"""Operations over in³ of the factorisation of a Gram matrix (in, in) that a solver does."""
_ROUNDING = 10  # products too
_TURNING = 1.5  # a step of a rotation over its products
_STEP = 4.3  # a step of tuning over a forward pass in its precision
_RUNS, _PROBED = 32, 3.0  # of what is timed: at the most, and seconds after which no other begins
_LAYER_COPIES, _GRAM_COPIES, _BLOCK_COPIES = 8, 6, 5  # float32 buffers: of the largest layer, its Gram matrix, a block


@dataclass(frozen=True)
class Estimate:
    """Seconds of the whole run; bytes beside the model. Both are of the order, no more."""

    seconds: float
    bytes: int


def estimate(walk: Walk, block: nn.Module, index: int, plan: PrunePlan, config: EGGSConfig) -> Estimate:
    """Estimate the run from passes of block `index` over one batch, as it is and as it is tuned, and one product.

    Blocks count by the weights that they prune; processes share the solvers' work. Hidden states on disk are no memory.
    """
    layers = {name: dense_weight(module).shape for name, module in plan.layers[index].items()}
    limit = wave_bytes(next(block.parameters()).device)
    prefix = f"{plan.block_list.block_name(index)}."
    waves = expert_waves(block, prefix, plan.layers[index], limit)
    experts = {name for wave in waves for name in wave}
    readers = {name: ("" if name in experts else name.rpartition(".")[0], shape[1]) for name, shape in layers.items()}
    first = walk.hidden[0]
    of_batch = _seconds(lambda: walk.run(block, index, 0, first))
    batches = len(walk.hidden)
    rows, columns = max(layers.values(), key=lambda shape: shape[0] * shape[1])
    device = first.device
    probe, square = torch.randn(rows, columns, device=device), torch.randn(columns, columns, device=device)
    rate = 2 * rows * columns**2 / _seconds(lambda: probe @ square)
    tokens = first.shape[:-1].numel() * batches

    matrices = {name if name in experts else reader: reader[1] for name, reader in readers.items()}
    work = _solving(layers.values(), matrices.values(), config) / walk.ranks.size + sum(
        (2 + 2 * bool(config.error_correction) + 2 * (config.rounding == "gptq")) * tokens * width**2
        for _, width in set(readers.values())
    )
    seconds = of_batch * batches * passes(readers.values(), len(waves), config) + work / rate
    tunings = [steps for steps in (config.block_tuning, config.rounding_tuning) if steps]
    if tunings:
        with in_float32(block), bfloat16_products(block):
            of_step = _STEP * _seconds(lambda: walk.run(block, index, 0, first, torch.float32))
        seconds += sum(tunings) * of_step + len(tunings) * 2 * len(judged_batches(batches)) * of_batch
    blocks = sum(_weights(each) for each in plan.layers) / _weights(plan.layers[index])
    held = 4 * _LAYER_COPIES * rows * columns + 4 * _GRAM_COPIES * columns**2
    held += max((4 * sum(layers[name][1] ** 2 for name in wave) for wave in waves), default=0)
    if not isinstance(walk.hidden, StatesOnDisk):
        lists = lists_held(kept_parts(block, prefix, plan.layers[index]), config)
        held += first.numel() * first.element_size() * batches * lists
    if config.error_correction:
        held += sum(parameter.nbytes for parameter in block.parameters())
    if tunings:
        held += 4 * _BLOCK_COPIES * sum(parameter.numel() for parameter in block.parameters())
    return Estimate(seconds * blocks, held)


def lists_held(kept: int, config: EGGSConfig) -> int:
    """Lists of hidden states at a time, at the most: what the pruned block gets, and the dense one, and of each `kept`.

    Args:
        kept: Parts of a block that are kept.
        config: What is done.
    """
    return 1 + bool(config.follows_dense) + kept * (1 + bool(config.error_correction))


def turning_seconds(of_block: float, sample: BlockSample, size: int, blocks: int) -> float:
    """Seconds to choose a rotation of a stream of `size` channels, from what reading one of so many blocks took."""
    weights = sample.weights()
    square = torch.randn(size, size, device=weights[0].device if weights else None)
    rate = 2 * size**3 / _seconds(lambda: square @ square)
    of_step = _TURNING * 4 * sum(weight.numel() for weight in weights) * size / rate
    return blocks * (of_block + STEPS * of_step)


def turning_announcement(seconds: float) -> str:
    """What is done before anything is pruned, and how long it will take."""
    return f"choosing a rotation first (a pass through the dense model, {STEPS} steps): about {duration(seconds)}"


def passes(readers: Iterable[tuple[str, int]], waves: int, config: EGGSConfig) -> float:
    """Passes of a block over all batches.

    Layers that read the same tensor take a quarter of one on average, since the pass ends with them, and parts of the
    block that are settled do not run; a wave of experts takes one, what leaves the block one, tuning and permutation
    one each; to correct errors the dense block takes as many as the statistics, and one. Rounding that passes its
    errors on takes the statistics again.

    Args:
        readers: What each layer reads: the module it is in, and its width; `""` for the module of experts.
        waves: Of experts.
        config: What is done.
    """
    stages = len({reads for reads in readers if reads[0]}) + 1
    found = 1 + stages / 4 + waves + bool(config.permutation) + bool(config.follows_dense)
    return found + (bool(config.error_correction) + (config.rounding == "gptq")) * (stages - 1) / 4


def announcement(
    model: nn.Module, windows: Tensor, hidden: Tensor, plan: PrunePlan, config: EGGSConfig, found: Estimate
) -> str:
    """What is about to be done, how long it will take, and how to make it shorter; `hidden` are states of a batch."""
    count, length = windows.shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    how = config.preset or config.solver
    return (
        f"{type(model).__name__}, {_size(parameters)} parameters, {where_and_how(hidden.device, hidden.dtype)}: "
        f"{len(plan.names)} layers to {config.pattern} ({how}), calibrated on {count} x {length} tokens\n"
        f"about {duration(found.seconds)}, and {found.bytes / 2**30:.1f} GiB beside the model; fewer or shorter "
        "windows (num_samples, seq_len) take less"
    )


def where_and_how(device: torch.device, dtype: torch.dtype) -> str:
    """Of a line that says what is about to be done.

    >>> where_and_how(torch.device("cuda", 1), torch.bfloat16)
    'on cuda:1, in bfloat16'
    """
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"on {device}{threads}, in {str(dtype).removeprefix('torch.')}"


def _size(parameters: int) -> str:
    """As the field writes it.

    >>> _size(134_515_008), _size(1_777_088_000)
    ('135M', '1.78B')
    """
    return f"{parameters / 1e6:.3g}M" if parameters < 999.5e6 else f"{parameters / 1e9:.3g}B"


def duration(seconds: float) -> str:
    """Rounded as far as an estimate is good for.

    >>> duration(0.3), duration(95), duration(1500), duration(80000)
    ('1 s', '2 min', '25 min', '22 h')
    """
    if seconds < 60:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _solving(layers: Collection[torch.Size], widths: Iterable[int], config: EGGSConfig) -> float:
    """Operations of the solvers of a block's layers, whose different Gram matrices have these widths."""
    products = _PRODUCTS[config.solver] + 2
    if config.weight_update == "refit":
        products += config.refit_steps + 1
    if config.error_correction:
        products += 3
    if config.rounding == "gptq":
        products += _ROUNDING
    # ADMM factorises anew for every layer, as its penalty goes another way
    factorised = [columns for _, columns in layers] if config.solver == "admm" else widths
    found = sum(2 * products * rows * columns**2 for rows, columns in layers)
    found += sum(FACTORISATION[config.solver] * columns**3 for columns in factorised)
    if config.error_correction and config.solver != "sparsegpt":  # which has that of its own
        found += sum(FACTORISATION["sparsegpt"] * columns**3 for columns in widths)
    return found


def _weights(layers: Mapping[str, nn.Module]) -> int:
    return sum(dense_weight(module).numel() for module in layers.values())


def _seconds(work: Callable[[], Tensor]) -> float:
    """Least seconds of some runs, with nothing left to do on the device.

    The first may take twice as long as the rest, as the system gives them memory that was not in use.
    """
    found: list[float] = []
    while len(found) < 2 or (len(found) < _RUNS and sum(found) < _PROBED):
        began = time.perf_counter()
        finish([work().device])
        found.append(time.perf_counter() - began)
    return min(found)
