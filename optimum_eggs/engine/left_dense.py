"""What is left dense, stored as integers: input embeddings and output head, and linear layers of the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.context import text_inputs
from ..config import EGGSConfig
from ..errors import ConfigError, ShapeError, first_line, is_out_of_memory, with_article
from ..nn import CodedEmbedding, CodedLinear, dense_weight, is_dense_linear
from ..nn.dense import is_conv1d
from ..nn.embedding import TiedCodedLinear
from ..packing.codes import Coding, store_codes
from ..update.rounding import nearest
from .error import token_error
from .plan import ignored_layers

_NUMBERS = 1 << 24  # that are rounded at a time
_SAME = 0.05  # of `token_error`, far beyond what eight bits do to an output


@torch.no_grad()
def code_left_dense(model: Any, config: EGGSConfig) -> dict[str, str]:
    """Store what `config.head` and `config.ignored` name as integers, in place, each value the nearest.

    Returns:
        As [`left_dense_codings`].

    Raises:
        ConfigError: as [`left_dense_codings`].
    """
    codings, embedding = left_dense_codings(model, config), None
    for name, module in chosen_modules(model, config).items():
        made: nn.Module
        if name not in codings:
            assert isinstance(module, nn.Linear)
            assert embedding is not None
            made = TiedCodedLinear(module, embedding)
        else:
            coding = Coding.parse(codings[name])
            codes, scale = nearest_dense(dense_weight(module), coding)
            if isinstance(module, nn.Embedding):
                made = embedding = CodedEmbedding.from_codes(module, codes, scale, coding)
            else:
                made = CodedLinear.from_codes(_as_linear(module), codes, scale, coding, is_conv1d(module))
        model.set_submodule(name, made)
    return codings


@torch.no_grad()
def check_left_dense(model: Any, config: EGGSConfig) -> None:
    """Raise unless `model` runs with integers where [`code_left_dense`] puts them. It is as it was.

    Without weights, on the meta device, it is seen whether it runs, and not what it gives; nothing is seen of a model
    that cannot run so.

    Raises:
        ConfigError: as [`left_dense_codings`]; or the model looks at the dtype of a weight.
    """
    before = chosen_modules(model, config)
    device = next(model.parameters()).device
    inputs = text_inputs(model, torch.arange(2, device=device)[None])
    without_weights = device.type == "meta"
    try:
        expected = model(**inputs)[0].float()
    except RuntimeError:
        if without_weights:
            return
        raise
    try:
        code_left_dense(model, config)
        found = model(**inputs)[0].float()
        error = 0.0 if without_weights else float(token_error(found, expected))
        why = None if error < _SAME else f"its output is {error**0.5:.0%} off"
    except (ShapeError, RuntimeError) as failure:
        if is_out_of_memory(failure):
            raise
        why = first_line(failure) if isinstance(failure, ShapeError) or not without_weights else None
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
    if why:
        asked = " and ".join(f"{key}='int8'" for key in ("head", "ignored") if getattr(config, key))
        raise ConfigError(f"{asked}: {type(model).__name__} cannot run with it: {why}")


def left_dense_codings(model: Any, config: EGGSConfig) -> dict[str, str]:
    """Name -> coding of what is stored as integers; a head that shares the embeddings' weight is not named.

    Raises:
        ConfigError: as [`chosen_modules`].
    """
    found = chosen_modules(model, config)
    names, weights = list(found), [id(module.get_parameter("weight")) for module in found.values()]
    tied = config.head and len(set(weights[:2])) < len(weights[:2])  # embeddings and head are the first two
    named = names[:1] + names[2:] if tied else names
    return {name: str(config.dense_coding()) for name in named}


def code_tensors(tensors: Mapping[str, Tensor], codings: Mapping[str, str], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `model`, with the weights of the modules in `codings` as codes and scales."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if name == key or name not in codings:
            found[key] = value
            continue
        weight = value.t() if is_conv1d(model.get_submodule(name)) else value
        codes, scale = nearest_dense(weight, Coding.parse(codings[name]))
        found |= {key: store_codes(codes, Coding.parse(codings[name])), f"{name}.weight_scale": scale}
    return found


def chosen_modules(model: Any, config: EGGSConfig) -> dict[str, nn.Module]:
    """The modules that `config.head` and `config.ignored` name, by dotted name.

    Raises:
        ConfigError: as [`outer_modules`]; or there is no layer to ignore.
    """
    found = outer_modules(model) if config.head else {}
    if config.ignored:
        layers = ignored_layers(model, config)
        if not layers:
            raise ConfigError(
                f"ignored={config.ignored!r}: `ignore` and `targets` leave no linear layer of the blocks dense; name "
                "some, or leave it out"
            )
        found |= layers
    return found


def _as_linear(module: nn.Module) -> nn.Linear:
    """A dense layer, or one that has its shape and bias."""
    if isinstance(module, nn.Linear):
        return module
    rows, columns = dense_weight(module).shape
    linear = nn.Linear(columns, rows, device="meta")
    linear.register_parameter("bias", module.get_parameter("bias"))
    return linear.train(module.training)


def outer_modules(model: Any) -> dict[str, nn.Module]:
    """The input embeddings of a model and, where it has one, its output head, by dotted name, in this order.

    Raises:
        ConfigError: they are of a kind whose values cannot be stored so.
    """
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    for module, fits in ((embeddings, _is_plain(embeddings)), (head, _is_linear(head))):
        if module is None:
            continue
        shared = _sharing(model, module, {embeddings, head})
        if shared is not None:
            raise ConfigError(
                f"head='int8': {names.get(module)} shares its weight with {shared}, which would not know of integers; "
                "leave head out"
            )
        if not fits:
            kind = with_article(type(module).__name__)
            raise ConfigError(
                f"head='int8': {names.get(module)} is {kind}, and what else it does to its values is not known; leave "
                "head out"
            )
        found[names[module]] = module
    return found


def _sharing(model: nn.Module, module: nn.Module, known: set[nn.Module | None]) -> str | None:
    """Another module than the `known` ones that has the weight of `module`."""
    weight = module._parameters.get("weight")
    for name, other in model.named_modules():
        if weight is not None and other not in known and any(part is weight for part in other._parameters.values()):
            return name
    return None


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


def _is_linear(module: nn.Module | None) -> bool:
    return module is not None and is_dense_linear(module) and not is_conv1d(module)


def nearest_dense(weight: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """The nearest codes (out, in), int8, of a large weight (out, in), and their scales; some rows at a time."""
    parts = weight.split(max(1, _NUMBERS // weight.shape[1]))
    codes, scales = zip(*(nearest(rows.to(torch.float32), coding) for rows in parts), strict=True)
    return torch.cat(codes), torch.cat(scales)
