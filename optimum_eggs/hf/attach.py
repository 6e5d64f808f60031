"""Making a pruned model one that transformers knows how to save, and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import EGGSConfig
from ..errors import ModelError
from ..nn import CodedEmbedding, CodedLinear, MatrixNorm, NMLinear
from ..nn.dense import is_adapter, read_fast
from ..nn.embedding import TiedCodedLinear
from ..nn.experts import SplitExperts, join_experts, keep_names
from ..nn.norm import times
from . import program
from .loading import parse_dtype
from .offload import follow, is_offloaded, onloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine import PruneReport


def attach_quantizer(model: PreTrainedModel, config: EGGSConfig, report: PruneReport | None = None) -> None:
    """Mark `model` as packed, the way `from_pretrained` leaves a model loaded from a packed checkpoint.

    The report is kept with it, so that a push finds the one that belongs to these weights.
    """
    from transformers import PreTrainedModel

    from .quantizer import EGGSHfQuantizer

    quantizer = EGGSHfQuantizer(config, pre_quantized=True)
    quantizer.report = report
    for name, value in (
        ("hf_quantizer", quantizer),
        ("is_quantized", True),
        ("quantization_method", config.quant_method),
    ):
        setattr(model, name, value)
    model.config.quantization_config = config
    take_over(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True  # flash attention asks which dtype to compute in


def take_over(model: PreTrainedModel) -> None:
    """Replace what transformers does otherwise for a packed model than for a dense one, until it is dense again.

    What is left dense reads its weight as fast as packed layers do. `model.push_to_hub` ends with this package's card,
    where transformers would write its template over it; `half` and `float` cast, which transformers refuses for every
    quantized model; and files name the layers as the model does, which the format asks for, where transformers has
    other names for some architectures.
    """
    keep_names(model)
    read_fast(model)
    own: dict[str, Any] = {"push_to_hub": _push_to_hub, "half": nn.Module.half, "float": nn.Module.float}
    if isinstance(model.get_input_embeddings(), CodedEmbedding):
        own["resize_token_embeddings"] = _resize_token_embeddings
    vars(model).update({name: partial(function, model) for name, function in own.items()})


def give_back(model: PreTrainedModel) -> None:
    """Undo [`take_over`], and the mark that the configurations of a packed model have."""
    from transformers import PreTrainedModel

    read_fast(model, fast=False)
    program.forget(model)
    names = ("push_to_hub", "half", "float", "resize_token_embeddings", "_weight_conversions", "generate")
    for name in (*names, "get_compiled_call", "_compiled_call"):
        vars(model).pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Any:
    embeddings: Any = model.get_input_embeddings()
    wanted = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
    wanted = -(-wanted // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    if wanted == embeddings.num_embeddings:
        return embeddings
    raise ModelError(
        f"resize_token_embeddings({wanted}): the embeddings hold integers (head='int8'), which do not grow; "
        "make the model dense first with dequantize(), or prune it without head='int8'"
    )


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> str:
    from ..sharing.models import push_model

    return push_model(model, repo_id, **options)


@torch.no_grad()
def unpack_layers(model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """Replace every packed or coded module by the dense one it came from, zeros in place. Changes and returns `model`.

    An offloaded layer stays offloaded: its dense weight is then kept in the CPU's memory.

    Args:
        model: A model on any device.
        dtype: Of all floating-point parameters afterwards. Default: that of the first of them, `model.dtype`.

    Raises:
        ConfigError: there is no such dtype.
        ModelError: an adapter lies on a packed layer, or the weights of one are nowhere. The model is as it was.
    """
    dtype = parse_dtype(dtype)
    if isinstance(dtype, str):
        dtype = model.dtype
    kinds = NMLinear | CodedLinear | CodedEmbedding
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, layer in layers.items():
        _check_free(model, name, layer)
    norm = next((name for name, module in model.named_modules() if isinstance(module, MatrixNorm)), None)
    if norm is not None and model.get_output_embeddings() is None:
        raise ModelError(
            f"{norm}: its gains are a matrix, which goes into the head of a dense model, and {type(model).__name__} "
            "has none; load it with its head, as AutoModelForCausalLM does"
        )
    embeddings: dict[nn.Module, nn.Module] = {}  # what a head shared with them, it shares again
    for name, layer in layers.items():
        with onloaded(layer):
            dense = _dense(layer, embeddings).to(dtype)
        if isinstance(layer, CodedEmbedding):
            embeddings[layer] = dense
        model.set_submodule(name, follow(dense, layer))
    _untie(model)
    join_experts(model, _join)
    cast_parameters(model, dtype)
    model.config.dtype = dtype
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a model that are floats, in place; no buffers: rotary tables are computed in float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, CodedEmbedding):
            module.like = module.like.to(dtype)


def _dense(layer: NMLinear | CodedLinear | CodedEmbedding, embeddings: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The dense module of a layer, with the weight of dense `embeddings` where it shares that of coded ones."""
    if isinstance(layer, CodedEmbedding):
        return layer.to_embedding()
    shared = embeddings.get(layer.embedding) if isinstance(layer, TiedCodedLinear) else None
    if shared is None:
        return layer.to_original()
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = shared.get_parameter("weight"), layer.bias
    return linear.train(layer.training)


def _untie(model: PreTrainedModel) -> None:
    """Give a head that shares the embeddings' weight one of its own, which takes in the last norm's matrix."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, MatrixNorm)}
    head: Any = model.get_output_embeddings()
    for name, norm in norms.items():
        with onloaded(norm, head):
            weight = times(head.weight.detach(), norm.weight.detach().to(head.weight.device, torch.float64))
            plain = norm.to_plain()
        model.set_submodule(name, follow(plain, norm))
        untied = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        untied.weight, untied.bias = nn.Parameter(weight), head.bias
        model.set_output_embeddings(follow(untied.train(head.training), head))
    if norms:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _check_free(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise unless the layer called `name` can be made dense."""
    parts = name.split(".")
    if any(is_adapter(model.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts))):
        raise ModelError(
            f"{name} is under an adapter, which holds for the packed layer alone; merge it first with "
            "merge_and_unload(), or take it off with unload()"
        )
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    if not is_offloaded(layer) and any(tensor is not None and tensor.is_meta for tensor in tensors):
        raise ModelError(f"{name} has no weights, since it is on the meta device; load the model with from_pretrained")


def _join(experts: SplitExperts) -> nn.Module:
    """The experts as 3-D parameters, offloaded where one of them is."""
    parts = list(experts.modules())
    with onloaded(*parts):
        joined = experts.join()
    return follow(joined, next(filter(is_offloaded, parts), experts))
