"""How long a pruning run will take, and how much memory, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Walk
from ..config import EGGSConfig
from ..nn import dense_weight
from .plan import PrunePlan

# Products of a layer's weight (out, in) with its Gram matrix (in, in) that a solver costs, and operations of its
# factorisation over in³, as counted or timed on two cores.
_PRODUCTS = {"score": 1, "sparsegpt": 3, "admm": 90}
_FACTORISATION = {"score": 0, "sparsegpt": 4, "admm": 60}
_BACKWARD = 3  # a step of tuning over a forward pass
_LAYER_COPIES, _GRAM_COPIES, _BLOCK_COPIES = 8, 6, 5  # float32 buffers: of the largest layer, its Gram matrix, a block


@dataclass(frozen=True)
class Estimate:
    """Seconds of the whole run; bytes beside the model. Both are of the order, no more."""

    seconds: float
    bytes: int


def estimate(walk: Walk, block: nn.Module, index: int, plan: PrunePlan, config: EGGSConfig) -> Estimate:
    """Estimate the run from one pass of block `index` over one batch, and one product in float32.

    The passes are counted: each stage of a block (layers that read the same tensor) takes half of one on average, what
    leaves the block takes one, tuning and permutation more. Blocks count by the weights that they prune.
    """
    layers = {name: dense_weight(module).shape for name, module in plan.layers[index].items()}
    stages = len({(name.rpartition(".")[0], shape[1]) for name, shape in layers.items()}) + 1
    one_pass = _seconds(lambda: walk.run(block, index, 0)) * len(walk.hidden)
    rows, columns = max(layers.values(), key=lambda shape: shape[0] * shape[1])
    device = walk.hidden[0].device
    probe, square = torch.randn(rows, columns, device=device), torch.randn(columns, columns, device=device)
    rate = 2 * rows * columns**2 / _seconds(lambda: probe @ square)
    tokens = sum(hidden.shape[:-1].numel() for hidden in walk.hidden)

    passes = 1 + stages / 2 + (1 if config.permutation else 0) + (1 if config.block_tuning else 0)
    seconds = one_pass * passes + _solving(layers, config, tokens) / rate
    if config.block_tuning:
        seconds += config.block_tuning * _BACKWARD * one_pass / len(walk.hidden)
    blocks = sum(_weights(each) for each in plan.layers) / _weights(plan.layers[index])
    hidden = sum(states.numel() * states.element_size() for states in walk.hidden)
    held = hidden * (3 if config.block_tuning else 1) + 4 * _LAYER_COPIES * rows * columns
    held += 4 * _GRAM_COPIES * columns**2
    if config.block_tuning:
        held += 4 * _BLOCK_COPIES * sum(parameter.numel() for parameter in block.parameters())
    return Estimate(seconds * blocks, held)


def announcement(model: nn.Module, walk: Walk, plan: PrunePlan, config: EGGSConfig, found: Estimate) -> str:
    """What is about to be done, how long it will take, and how to make it shorter."""
    count, length = sum(len(hidden) for hidden in walk.hidden), walk.hidden[0].shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device, dtype = walk.hidden[0].device, str(walk.hidden[0].dtype).removeprefix("torch.")
    where = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    how = config.preset or config.solver
    return (
        f"{type(model).__name__}, {parameters / 1e6:,.3g} M parameters, on {where}, in {dtype}: "
        f"{len(plan.names)} layers to {config.pattern} ({how}), calibrated on {count} x {length} tokens\n"
        f"about {_duration(found.seconds)}, and {found.bytes / 2**30:.1f} GiB beside the model; fewer or shorter "
        "windows (num_samples, seq_len) take less"
    )


def _duration(seconds: float) -> str:
    """Rounded as far as an estimate is good for.

    >>> _duration(0.3), _duration(95), _duration(1500), _duration(80000)
    ('1 s', '2 min', '25 min', '22 h')
    """
    if seconds < 60:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _solving(layers: Mapping[str, torch.Size], config: EGGSConfig, tokens: int) -> float:
    """Operations of the statistics and solvers of a block's layers."""
    products = _PRODUCTS[config.solver] + 2
    if config.weight_update == "refit":
        products += config.refit_steps + 1
    found = 0.0
    for rows, columns in layers.values():
        found += 2 * products * rows * columns**2 + _FACTORISATION[config.solver] * columns**3
    for columns in {(name.rpartition(".")[0], shape[1]): shape[1] for name, shape in layers.items()}.values():
        found += 2 * tokens * columns**2
    return found


def _weights(layers: Mapping[str, nn.Module]) -> int:
    return sum(dense_weight(module).numel() for module in layers.values())


def _seconds(work: Callable[[], Tensor]) -> float:
    """Least seconds of two runs, with nothing left to do on the device."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        found.append(time.perf_counter() - began)
    return min(found)
