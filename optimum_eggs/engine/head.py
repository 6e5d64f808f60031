"""The input embeddings and the output head of a model, stored as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.context import text_inputs
from ..errors import ConfigError, ShapeError, with_article
from ..nn import CodedEmbedding, CodedLinear, dense_weight, is_dense_linear
from ..nn.dense import is_conv1d
from ..nn.embedding import TiedCodedLinear
from ..packing.codes import Coding, store_codes
from ..update.rounding import nearest

_NUMBERS = 1 << 24  # that are rounded at a time


@torch.no_grad()
def code_head(model: Any, coding: Coding) -> dict[str, str]:
    """Store the input embeddings and the output head of `model` as integers, in place, each value the nearest.

    Returns:
        As [`head_codings`].

    Raises:
        ConfigError: as [`outer_modules`].
    """
    codings, modules = head_codings(model, coding), outer_modules(model)
    embedding: CodedEmbedding | None = None
    for name, module in modules.items():
        if name not in codings:
            assert isinstance(module, nn.Linear)
            assert embedding is not None
            made: nn.Module = TiedCodedLinear(module, embedding)
        else:
            codes, scale = nearest_dense(dense_weight(module), coding)
            if isinstance(module, nn.Embedding):
                made = embedding = CodedEmbedding.from_codes(module, codes, scale, coding)
            else:
                assert isinstance(module, nn.Linear)
                made = CodedLinear.from_codes(module, codes, scale, coding)
        model.set_submodule(name, made)
    return codings


@torch.no_grad()
def check_head(model: Any, coding: Coding) -> None:
    """Raise unless `model`, which is loaded, runs with embeddings and head of integers. It is as it was then.

    Raises:
        ConfigError: as [`outer_modules`]; or the model looks at the dtype of the head's weight.
    """
    before = outer_modules(model)
    code_head(model, coding)
    try:
        device = next(model.parameters()).device
        model(**text_inputs(model, torch.arange(2, device=device)[None]))
    except ShapeError as error:
        raise ConfigError(f"head='int8': {type(model).__name__} cannot run with it: {error}") from error
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def head_codings(model: Any, coding: Coding) -> dict[str, str]:
    """Name -> coding of the embeddings and the head; a head that shares the embeddings' weight is not named.

    Raises:
        ConfigError: as [`outer_modules`].
    """
    weights: dict[int, str] = {}
    for name, module in outer_modules(model).items():
        weights.setdefault(id(module.get_parameter("weight")), name)
    return dict.fromkeys(weights.values(), str(coding))


def code_tensors(tensors: Mapping[str, Tensor], codings: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, with the weights of the modules in `codings` as codes and scales."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if name == key or name not in codings:
            found[key] = value
            continue
        codes, scale = nearest_dense(value, Coding.parse(codings[name]))
        found |= {key: store_codes(codes, Coding.parse(codings[name])), f"{name}.weight_scale": scale}
    return found


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
