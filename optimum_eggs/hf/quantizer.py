"""The transformers quantizer: prune on load, load a packed checkpoint, save one.

Importing this module makes transformers know `quant_method: "eggs"`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..config import QUANT_METHOD, EGGSConfig
from ..errors import CheckpointError, ConfigError, ModelError, shorten, with_article
from ..names import hub_id
from ..nn import (
    CodedEmbedding,
    CodedLinear,
    MatrixNorm,
    NMLinear,
    coded_modules,
    dense_weight,
    is_dense_linear,
    packed_layers,
)
from ..nn.dense import is_conv1d
from ..nn.embedding import TiedCodedLinear
from ..nn.experts import conversions_for, is_fused_experts, split_experts
from ..nn.norm import rms_eps
from ..packing.checkpoint import TensorEntry, check_files, check_packed_tensors, listed_modules, read_headers
from ..packing.codes import Coding
from ..pattern import NMPattern
from .attach import attach_quantizer, give_back, take_over, unpack_layers
from .loading import found_by, load_tokenizer, own_memory, set_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..engine import PruneReport

logger = logging.getLogger(__name__)


class EGGSHfQuantizer(HfQuantizer):
    """Prunes a dense model as it is loaded, or swaps in packed layers for a packed checkpoint.

    Attributes:
        report: The report of the pruning, after a dense model was pruned on load.
        file: One of the files that the weights were loaded from; None for a state dict.
        to_save: The state dict to save in place of the model's own, while that is being done.
        rounds_in_training: Whether the model's layers of integers are replaced by such that train.
        compiles: Whether `generate` compiles the model.
    """

    requires_calibration = False
    quantization_config: EGGSConfig

    def __init__(self, quantization_config: EGGSConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: PruneReport | None = None
        self.to_save: dict[str, torch.Tensor] | None = None
        self.rounds_in_training = False
        self.compiles = False
        self._loading: PreTrainedModel | None = None
        self.file: str | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse to prune a model of which a part would stay on disk."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError(
                "device_map sends a part of the model to 'disk', and what is not in memory cannot be pruned on load; "
                "use device_map='cpu', or none"
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        _check_not_split(model, self.pre_quantized)
        self.file = next(iter(checkpoint_files or []), None)
        if not self.pre_quantized:
            if hub_id(model.config._name_or_path):
                set_commit(model, self.file)
            return
        pruned = self.quantization_config.pruned_modules
        if not pruned:
            raise CheckpointError(
                "config.json: quantization_config.pruned_modules is missing or empty, so it is not known which layers "
                "are packed; prune the model again"
            )
        # Without files, a state dict was passed, which is not shown: it is checked when it is loaded.
        coded = self.quantization_config.coded_modules or {}
        stored = {} if checkpoint_files is None else check_files(checkpoint_files, pruned, coded)
        prefix = f"{model.base_model_prefix}."
        fused = [name.removeprefix(prefix) for name, module in model.named_modules() if is_fused_experts(module)]
        if any(f"{experts}." in name for name in pruned for experts in fused):
            split_experts(model)
            self._loading = model
        modules = dict(model.named_modules())
        patterns, kinds = listed_modules(pruned, coded)
        for name, pattern in patterns.items():
            _swap_in(model, modules, name, pattern, kinds.get(name), stored.get(name))
        _swap_norms(model, modules, self.quantization_config.matrix_norms or [], checkpoint_files)
        for module in model.modules():
            if isinstance(module, CodedLinear | CodedEmbedding):
                vars(module)["_is_hf_initialized"] = True  # transformers would draw floats for what stays on a disk

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Those of transformers, but for what makes 3-D parameters of experts that are split."""
        found = super().update_weight_conversions(weight_conversions, *model)  # older versions do not pass the model
        return found if self._loading is None else conversions_for(self._loading, found)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._loading = None
        _check_not_split(model, self.pre_quantized)  # older versions of transformers split it after the first look
        if self.pre_quantized:
            for name, module in model.named_modules():
                if isinstance(module, MatrixNorm) and self.file is None:
                    _check_filled(name, module)
            for name, layer in {**packed_layers(model), **coded_modules(model)}.items():
                if self.file is None:
                    _check_filled(name, layer)
                _check_contents(name, layer)
            take_over(model)
            return model
        return self._prune(model)

    def _prune(self, model: PreTrainedModel) -> PreTrainedModel:
        from ..calibration.context import check_reads_text
        from ..engine import calibrate_and_prune

        check_reads_text(model)  # before a tokenizer is looked for
        config = self.quantization_config
        tokenizer = config.tokenizer or _own_tokenizer(model, config, self.file)
        own_memory(model)
        report = calibrate_and_prune(model, tokenizer, config)
        attach_quantizer(model, EGGSConfig.from_dict(report.config), report)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Make `model` dense, zeros in place: what `model.dequantize` calls. As for [`unpack_layers`].

        transformers' own would ask for the dtype of the configuration, which does not know of a cast since.
        """
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        unpack_layers(model, dtype)
        give_back(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """What is to be saved, None for the model's own state; and nothing else for the files' headers."""
        return self.to_save, {}

    def is_serializable(self) -> bool:
        """Packed models are saved by `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: PEFT's LoRA is masked on packed layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without, too: packed floats are parameters like any other, and are trained under their mask; no integers."""
        config = self.quantization_config
        return self.rounds_in_training or not (config.coded_modules or {}).keys() & (config.pruned_modules or {}).keys()

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles the model by itself: after [`compile_generation`]."""
        return self.compiles


def _check_not_split(model: PreTrainedModel, packed: bool) -> None:
    """Raise if transformers splits the model over processes in a way that it cannot take.

    Packed layers stay whole under FSDP, which puts them together before they run, and in a pipeline.

    Raises:
        ModelError: a tensor or expert parallel plan, or any at all for a model that is to be pruned.
    """
    asked = getattr(model.config, "distributed_config", None)
    keys = ["tp_size", "ep_size"] if packed else ["tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size"]
    sizes = {key: getattr(asked, key, None) or 1 for key in keys}
    sizes["tp_size"] = max(sizes["tp_size"], getattr(model, "_tp_size", None) or 1)
    key = next((key for key, size in sizes.items() if size > 1), None)
    if key is None:
        return
    if packed:
        raise ModelError(
            f"{key}={sizes[key]} would split packed layers, which know no such plan; load the model with a device_map, "
            "or make it dense with `optimum-cli eggs export` and load that"
        )
    raise ModelError(
        f"{key}={sizes[key]} would split the model that is to be pruned; load it whole, or let processes share the "
        "work with `torchrun -m optimum_eggs prune`"
    )


def _own_tokenizer(model: PreTrainedModel, config: EGGSConfig, file: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the `file` that `model` was loaded from, of the same revision, if text calibrates.

    Code that comes with it is run if that of the model was.
    """
    from ..calibration.windows import needs_tokenizer

    if not needs_tokenizer(config.calibration, config.text_column):
        return None
    revision = getattr(model.config, "_commit_hash", None)
    trusted = type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
    source = model.config._name_or_path
    options = ({"revision": revision} if revision else {}) | found_by(source, file)
    return load_tokenizer(source, token=config.token, trust_remote_code=trusted, **options)


def _check_contents(name: str, layer: NMLinear | CodedLinear | CodedEmbedding) -> None:
    """Check what a packed or coded module holds. One that is offloaded to disk has been checked by its shapes alone."""
    parts = (layer.weight, getattr(layer, "weight_meta", None), getattr(layer, "weight_scale", None))
    if not any(part is not None and part.is_meta for part in parts):
        weight, meta, scale = parts
        pattern, coding = getattr(layer, "pattern", None), getattr(layer, "coding", None)
        check_packed_tensors(name, weight, meta, pattern, scale, coding)


def _check_filled(name: str, layer: nn.Module) -> None:
    """Raise unless the loader found all tensors of a packed layer; it makes up what it does not find.

    Raises:
        CheckpointError: one of them is missing.
    """
    for part, tensor in {**layer._parameters, **layer._buffers}.items():
        if part in layer._non_persistent_buffers_set:
            continue
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
            raise CheckpointError(
                f"{name}: the configuration lists it, and its {part} is missing in the state dict; pass that "
                "of the packed model"
            )


def _swap_in(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    listed: str,
    pattern: NMPattern | None,
    coding: Coding | None,
    stored: Mapping[str, TensorEntry] | None,
) -> None:
    """Replace the dense module that config.json calls `listed` by an empty packed one; `stored`, if known, must fit.

    Without a pattern it is one whose values are all kept, as integers; of those, a base model lacks the head.
    """
    prefix = f"{model.base_model_prefix}."
    # A base model is loaded from the checkpoint of a model with a head, or the other way round.
    name = next((n for n in (listed, listed.removeprefix(prefix), prefix + listed) if n in modules), None)
    how = f"pruned to {pattern}" if pattern is not None else f"coded ({coding})"
    if name is None:
        if pattern is None and model.get_output_embeddings() is None:
            return
        raise CheckpointError(
            f"{listed}: config.json lists it as {how}, and {type(model).__name__} has no such layer; load the model "
            "with the class it was saved from, and a mixture of experts with transformers 5.20 or later"
        )
    dense = modules[name]
    layer: NMLinear | CodedLinear | CodedEmbedding
    if isinstance(dense, nn.Embedding) and pattern is None and coding is not None:
        layer = _empty_embedding(dense, coding)
    elif is_dense_linear(dense):
        layer = _empty_linear(name, dense, pattern, coding)
    else:
        raise CheckpointError(
            f"{name}: config.json lists it as {how}, and it is {with_article(type(dense).__name__)}, no linear"
        )
    for part in ("weight", "weight_scale"):
        expected = getattr(layer, part, None)
        if stored is not None and expected is not None and stored[part].shape != expected.shape:
            raise CheckpointError(
                f"{name}: {part} has shape {stored[part].shape}; in the {type(model).__name__} of config.json it must "
                f"be {tuple(expected.shape)}, {how}; download the checkpoint again"
            )
    if stored is not None and getattr(layer, "bias", None) is not None and "bias" not in stored:
        raise CheckpointError(f"{name}: its bias is missing; download the checkpoint again")
    model.set_submodule(name, layer)
    if isinstance(layer, CodedEmbedding):
        _share_with_head(model, dense, layer)


def _swap_norms(
    model: PreTrainedModel, modules: dict[str, nn.Module], listed: list[str], files: list[str] | None
) -> None:
    """Replace the norms that config.json lists by empty ones whose gains are a matrix; `files`, if known, must fit."""
    entries = None if files is None or not listed else read_headers(files)
    prefix = f"{model.base_model_prefix}."
    for path in listed:
        name = next((n for n in (path, path.removeprefix(prefix), prefix + path) if n in modules), None)
        if name is None or rms_eps(modules[name]) is None:
            raise CheckpointError(
                f"{path}: config.json lists it as a norm whose gains are a matrix, and {type(model).__name__} has no "
                "RMS norm of that name; load the model with the class it was saved from"
            )
        made = MatrixNorm.in_place_of(modules[name])
        if entries is not None:
            entry = entries.get(f"{path}.weight")
            if entry is None or entry.shape != made.weight.shape:
                found = "is missing" if entry is None else f"has shape {entry.shape}"
                raise CheckpointError(
                    f"{path}: its weight {found}; config.json lists it as a norm whose gains are a matrix, which must "
                    f"be {tuple(made.weight.shape)}; download the checkpoint again"
                )
        model.set_submodule(name, made)


def _empty_linear(
    name: str, dense: nn.Module, pattern: NMPattern | None, coding: Coding | None
) -> NMLinear | CodedLinear:
    weight = dense_weight(dense)
    if pattern is not None and weight.shape[1] % pattern.m:
        raise CheckpointError(
            f"{name}: config.json says {pattern}, and in_features={weight.shape[1]} is not a multiple of m={pattern.m}"
        )
    columns, rows, has_bias = weight.shape[1], weight.shape[0], dense.bias is not None
    where: dict[str, Any] = {
        "fan_in_fan_out": is_conv1d(dense),
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if coding is not None:
        return CodedLinear(columns, rows, has_bias, pattern, coding, **where)
    assert pattern is not None
    return NMLinear(columns, rows, has_bias, pattern, **where)


def _empty_embedding(dense: nn.Embedding, coding: Coding) -> CodedEmbedding:
    where: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    return CodedEmbedding(dense.num_embeddings, dense.embedding_dim, dense.padding_idx, coding, **where)


def _share_with_head(model: PreTrainedModel, dense: nn.Module, embedding: CodedEmbedding) -> None:
    """Let the head share coded embeddings, if it shares the dense ones."""
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if head is None or not isinstance(head, nn.Linear) or isinstance(head, CodedLinear):
        return
    name = names[head]
    if f"{name}.weight" in model.all_tied_weights_keys:
        model.set_submodule(name, TiedCodedLinear(head, embedding))


_NO_DEMAND = {"calibration", "split", "text_column", "dataset_config_name", "dataset_revision", "batch_size", "preset"}
"""Keys of a configuration that the weights do not show: where a text came from, and what others stand for."""


def _check_agrees(given: Any, stored: EGGSConfig) -> None:
    """Raise if a configuration passed for a packed model asks for something else than what the model is.

    What is as by default is no demand, but for the pattern.

    Raises:
        ConfigError: it does.
    """
    leave = "leave quantization_config out to load the model as it is"
    if not isinstance(given, EGGSConfig):
        raise ConfigError(
            f"quantization_config is {with_article(type(given).__name__)}, and the model is packed at "
            f"{stored.pattern}; {leave}, or make it dense first with `optimum-cli eggs export`"
        )
    if given.pattern != stored.pattern:
        raise ConfigError(
            f"quantization_config asks for {given.pattern}, and the model is packed at {stored.pattern}; {leave}, or "
            "prune the dense model again"
        )
    asked, has = given.to_dict(), stored.to_dict()
    default = EGGSConfig(given.pattern, values=given.values, head=given.head, ignored=given.ignored).to_dict()
    integers = ("values", "head", "ignored", "format_version")
    default |= {key: EGGSConfig(given.pattern).to_dict()[key] for key in integers}
    for key in asked:
        if key not in _NO_DEMAND and asked[key] not in (default[key], has[key]):
            raise ConfigError(
                f"quantization_config asks for {key}={shorten(asked[key])}, and the model was pruned with "
                f"{key}={shorten(has[key])}; {leave}, or prune the dense model again"
            )


def _wrap_merging(kind: Any) -> None:
    """Have transformers refuse a configuration that contradicts a packed model's; it would only warn, and drop it."""
    merge = kind.merge_quantization_configs.__func__
    if getattr(merge, "knows_packed_models", False):
        return

    @functools.wraps(merge)
    def merge_quantization_configs(
        cls: Any, quantization_config: Any, quantization_config_from_args: Any = None
    ) -> Any:
        stored, given = quantization_config, quantization_config_from_args
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        if given is None or method != QUANT_METHOD:
            return merge(cls, stored, given)
        stored = EGGSConfig.from_dict(stored) if isinstance(stored, dict) else stored
        _check_agrees(given, stored)
        return stored

    merge_quantization_configs.knows_packed_models = True  # type: ignore[attr-defined]
    kind.merge_quantization_configs = classmethod(merge_quantization_configs)


def _wrap_reading(kind: Any) -> None:
    """Have `quantization_config=None` mean nothing for a packed model, as `from_pretrained` of its own class does.

    The auto classes read the model's configuration with it, which it then takes the place of: the packed weights would
    be taken for dense ones. A configuration that is read by itself has it taken out as before.
    """
    read = kind.from_dict.__func__
    if getattr(read, "knows_packed_models", False):
        return

    @functools.wraps(read)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        stored = config_dict.get("quantization_config")
        packed = isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD
        if packed and kwargs.get("return_unused_kwargs") and kwargs.get("quantization_config", stored) is None:
            del kwargs["quantization_config"]
        return read(cls, config_dict, **kwargs)

    from_dict.knows_packed_models = True  # type: ignore[attr-defined]
    kind.from_dict = classmethod(from_dict)


_wrap_merging(AutoHfQuantizer)
_wrap_reading(PreTrainedConfig)
# transformers refuses to register a name twice, as a module that is run again would.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(EGGSConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(EGGSHfQuantizer)
