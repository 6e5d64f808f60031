"""Which layers of a model are pruned, and why the others are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..calibration import BlockList, find_block_list
from ..config import EGGSConfig
from ..errors import ConfigError, ModelError, NumericalError, ShapeError, more, with_article
from ..masks.expander import check_floor
from ..nn import NMLinear, dense_weight, is_dense_linear
from ..nn.dense import is_adapter
from ..nn.experts import SplitExperts, keep_names, split_experts
from .report import DenseLayer

_FEW_OUTPUTS = 16  # fewer are a gate's: a mask there saves next to nothing, and moves all that the gate scales


@dataclass
class PrunePlan:
    """The layers to prune, block by block, by full dotted name; and what is left dense, and why.

    `runs_in_integers`: whether a block has been seen to run with layers of integers.
    """

    block_list: BlockList
    layers: list[dict[str, nn.Module]]
    left_dense: list[DenseLayer] = field(default_factory=list)
    runs_in_integers: bool = False

    @property
    def names(self) -> list[str]:
        """The names of all layers to prune, in the order of the blocks."""
        return [name for block in self.layers for name in block]


def make_plan(model: nn.Module, config: EGGSConfig, loaded: bool = True, fitting: bool = True) -> PrunePlan:
    """Decide which layers to prune, and check everything about them that can be known before work begins.

    Experts that are held as 3-D parameters are split into linear layers, in place, if any of them is to be pruned.

    Args:
        model: The model.
        config: What to do.
        loaded: Whether its weights are there; if not, whoever loads them checks them.
        fitting: Whether pattern and floor must fit every layer; if not, whoever packs them sees which they fit.

    Raises:
        ConfigError: a name pattern that matches nothing.
        ModelError: no list of blocks, a packed model, one under adapters, nothing to prune, or weights that are not in
            memory.
        ShapeError: m does not divide a layer's inputs, or a layer has too few outputs for the floor.
        NumericalError: a weight is NaN or infinite.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, NMLinear)), None)
    if packed is not None:
        raise ModelError(f"{packed}: is packed already; call model.dequantize() first, or start from the dense model")
    adapted = next((name for name, module in model.named_modules() if is_adapter(module)), None)
    if adapted is not None:
        raise ModelError(
            f"{adapted or type(model).__name__} is under an adapter, which would be left beside a pruned weight that "
            "it was not made for; merge it first with merge_and_unload(), or take it off with unload()"
        )
    fused = split_experts(model)
    try:
        plan = _plan(model, config, loaded, fitting)
    except BaseException:
        _put_back(model, fused)
        raise
    if any(_holder(name, fused) for name in plan.names):
        keep_names(model)
    else:
        _put_back(model, fused)
        plan.left_dense = as_fused(plan.left_dense, fused)
    return plan


def _plan(model: nn.Module, config: EGGSConfig, loaded: bool, fitting: bool) -> PrunePlan:
    modules = dict(model.named_modules())
    block_list = find_block_list(model, config.block_list)
    linears = {name: module for name, module in modules.items() if is_dense_linear(module)}
    routers = _routers(modules)
    _check_patterns(config, list(linears))

    plan = PrunePlan(block_list, [{} for _ in block_list.blocks])
    for name, module in modules.items():
        block = _block_index(name, block_list.name)
        if name not in linears:
            plan.left_dense += _other_matrices(name, module, inside=block is not None)
            continue
        reason = _why_dense(name, block, config) or _why_gate(name, module, routers.get(name, 0), config)
        if reason:
            plan.left_dense.append(DenseLayer(name, reason, dense_weight(module).numel()))
        elif block is not None:
            plan.layers[block][name] = module
    if fitting:
        _check_layers(plan, config)
    for layers in plan.layers if loaded else []:
        _check_weights(layers)
    return plan


def _put_back(model: nn.Module, fused: Mapping[str, nn.Module]) -> None:
    for name, module in fused.items():
        model.set_submodule(name, module)


def as_fused(left_dense: Sequence[DenseLayer], fused: Collection[str]) -> list[DenseLayer]:
    """What is left dense, with the experts of each of `fused` as the one module that they are."""
    found: dict[str, DenseLayer] = {}
    for layer in left_dense:
        name = _holder(layer.name, fused) or layer.name
        before = found[name].parameters if name in found else 0
        found[name] = DenseLayer(name, layer.reason, before + layer.parameters)
    return list(found.values())


def _holder(name: str, modules: Collection[str]) -> str | None:
    """Which of `modules`, by dotted name, the layer called `name` is within."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    """Raise unless the weights of layers, by name, can be pruned.

    Raises:
        ModelError: a weight is not in memory, or only a part of it.
        NumericalError: a weight is NaN or infinite.
    """
    for name, module in layers.items():
        weight = dense_weight(module)
        if hasattr(weight, "placements"):  # torch's DTensor, which some builds of torch do not have
            raise ModelError(
                f"{name}: its weight is split over processes ({weight.placements}); load the model whole, or let "
                "processes share the work with `torchrun -m optimum_eggs prune`"
            )
        if weight.device.type == "meta":
            raise ModelError(
                f"{name}: its weight is not in memory (device meta), as with offloading to disk; load the model "
                "without offloading"
            )
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{name}: the weight holds NaN or infinite values; the checkpoint may be damaged")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the patterns: globs that may leave out leading and trailing parts.

    >>> matches("model.layers.0.mlp.down_proj", ["down_proj"]), matches("model.layers.0.mlp.down_proj", ["layers.0"])
    (True, True)
    >>> matches("model.layers.10.mlp.down_proj", ["layers.1"]), matches("lm_head", ["*.mlp.*"])
    (False, False)
    """
    return any(
        fnmatchcase(name, whole) for part in patterns for whole in (part, f"*.{part}", f"{part}.*", f"*.{part}.*")
    )


def _why_dense(name: str, block: int | None, config: EGGSConfig) -> str | None:
    if matches(name, config.ignore):
        return "matches `ignore`"
    if block is None:
        if config.targets is not None and matches(name, config.targets):
            raise ConfigError(
                f"targets={config.targets!r} matches {name}, which is outside the list of blocks and cannot be "
                "calibrated; leave it out"
            )
        return "outside the list of blocks"
    if config.targets is not None and not matches(name, config.targets):
        return "not in `targets`"
    return None


def ignored_layers(model: nn.Module, config: EGGSConfig) -> dict[str, nn.Module]:
    """Linear layers of the blocks that `ignore` or `targets` leave dense; no routers, gates or split experts."""
    modules = dict(model.named_modules())
    block_list, routers = find_block_list(model, config.block_list), _routers(modules)
    experts = tuple(f"{name}." for name, module in modules.items() if isinstance(module, SplitExperts))
    found = {}
    for name, module in modules.items():
        block = _block_index(name, block_list.name)
        if block is None or not is_dense_linear(module) or name.startswith(experts):
            continue
        if _why_dense(name, block, config) and not _why_gate(name, module, routers.get(name, 0), config):
            found[name] = module
    return found


def _why_gate(name: str, linear: nn.Module, routes: int, config: EGGSConfig) -> str | None:
    """Why a layer that routes or gates stays dense, unless a target names it itself and not a module around it.

    Args:
        name: The layer's.
        linear: The layer.
        routes: For a router's layer, how many of the last parts of its name tell that it is one; else 0.
        config: With the targets.
    """
    outputs = dense_weight(linear).shape[0]
    if not routes and outputs >= _FEW_OUTPUTS:
        return None
    own = name.split(".")[-max(routes, 1) :]
    for pattern in config.targets or []:
        last = pattern.split(".")[-len(own) :]
        if len(last) == len(own) and "*" not in last and all(map(fnmatchcase, own, last)) and matches(name, [pattern]):
            return None
    return "a router of experts" if routes else f"only {outputs} output{'s' * (outputs > 1)}, as gates have"


def _routers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The linear layers that route, and how many of the last parts of their names tell that.

    Those are all that are in the module beside experts that is called their router, or if none is, what has one output
    for each expert. In a router of several, one part does not tell: Zaya's have a `down_proj` as its experts do.
    """
    found: dict[str, int] = {}
    for name, experts in modules.items():
        parent, _, own = name.rpartition(".")
        if own != "experts":
            continue
        count = getattr(experts, "num_experts", None) or len(list(experts.children()))
        beside = {key: module for key, module in modules[parent].named_children() if key != own}
        called = {key: module for key, module in beside.items() if _is_router(key, module)}
        for key, module in (called or beside).items():
            root = ".".join(part for part in (parent, key) if part)
            linears = [part for part, inner in module.named_modules(prefix=root) if is_dense_linear(inner)]
            if called or (len(linears) == 1 and dense_weight(modules[linears[0]]).shape[0] == count):
                found |= dict.fromkeys(linears, min(len(linears), 2))
    return found


def _is_router(name: str, module: nn.Module) -> bool:
    """Whether a module beside experts calls itself their router: `gate`, not `gate_proj` or `per_layer_input_gate`."""
    return name in ("gate", "router") or type(module).__name__.endswith(("Router", "Gate", "Gating"))


def _other_matrices(name: str, module: nn.Module, inside: bool) -> list[DenseLayer]:
    """The weights of a module that is no dense linear layer, where a reader would ask why they are dense."""
    if not (inside or isinstance(module, nn.Embedding)):
        return []
    kind = type(module).__name__
    experts = kind.endswith("Experts") or name.rpartition(".")[2] == "experts"
    return [
        DenseLayer(
            f"{name}.{key}",
            "holds experts as one 3-D parameter"
            if experts and value.dim() == 3
            else f"{with_article(kind)}, not a linear",
            value.numel(),
        )
        for key, value in module.named_parameters(recurse=False)
        if value.dim() >= 2
    ]


def _block_index(name: str, list_name: str) -> int | None:
    rest = name.removeprefix(f"{list_name}.")
    return int(rest.split(".")[0]) if rest != name else None


def _check_patterns(config: EGGSConfig, names: list[str]) -> None:
    given = [("targets", part) for part in config.targets or []]
    given += [("ignore", part) for part in config.ignore if part != "lm_head"]
    for key, part in given:
        if not any(matches(name, [part]) for name in names):
            raise ConfigError(
                f"{key}: the pattern {part!r} matches no linear layer; the first are {names[:4]}, and a pattern may "
                "leave out leading and trailing parts of a name"
            )


def _check_layers(plan: PrunePlan, config: EGGSConfig) -> None:
    if not plan.names:
        raise ModelError(f"there is nothing to prune: targets={config.targets!r} and ignore={config.ignore!r}")
    _check_inputs(plan, config)
    for layers in plan.layers:
        for name, module in layers.items():
            weight = dense_weight(module)
            try:
                check_floor(weight.shape[0], config.pattern, config.min_degree, config.band)
            except ConfigError as error:
                raise ShapeError(f"{name}: {error}") from error


def _check_inputs(plan: PrunePlan, config: EGGSConfig) -> None:
    """Raise if m does not divide the inputs of some layers, with what to ignore so that it divides all."""
    m = config.pattern.m
    widths = {name: dense_weight(module).shape[1] for layers in plan.layers for name, module in layers.items()}
    bad = [name for name, width in widths.items() if width % m]
    if bad:
        ignore = [*config.ignore, *_patterns_of(bad, [name for name, width in widths.items() if not width % m])]
        sizes = " and ".join(str(width) for width in sorted({widths[name] for name in bad}))
        raise ShapeError(
            f"{', '.join(bad[:6])}{more(bad, 6)}: in_features={sizes} is not a multiple of m={m}; leave them dense "
            f"with ignore={ignore} (--ignore {' '.join(ignore)}), or choose another pattern"
        )


def _patterns_of(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Few name patterns that match all of `names` and none of `others`: the ends of names, as short as may be.

    >>> _patterns_of(["layers.0.fc2", "layers.1.fc2"], ["layers.0.fc1", "layers.1.fc1"])
    ['fc2']
    >>> _patterns_of(["layers.1.fc2"], ["layers.0.fc2"])
    ['layers.1.fc2']
    """
    found: list[str] = []
    for name in names:
        if matches(name, found):
            continue
        parts = name.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))[::-1] if not parts[start].isdecimal()]
        found.append(next((end for end in ends if not any(matches(other, [end]) for other in others)), name))
    return found
