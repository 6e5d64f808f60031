"""The transformers quantizer: prune on load, load a packed checkpoint, save one.

Importing this module makes transformers know `quant_method: "eggs"`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..config import QUANT_METHOD, EGGSConfig
from ..errors import CheckpointError, ModelError
from ..names import hub_id
from ..nn import NMLinear, dense_weight, is_dense_linear
from ..nn.dense import is_conv1d
from ..nn.experts import conversions_for, is_fused_experts, split_experts
from ..packing.checkpoint import TensorEntry, check_files, check_packed_tensors
from ..pattern import NMPattern
from .attach import attach_quantizer, give_back, packed_layers, take_over, unpack_layers
from .loading import load_tokenizer, own_memory, set_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..engine import PruneReport

logger = logging.getLogger(__name__)


class EGGSHfQuantizer(HfQuantizer):
    """Prunes a dense model as it is loaded, or swaps in packed layers for a packed checkpoint.

    Attributes:
        report: The report of the pruning, after a dense model was pruned on load.
    """

    requires_calibration = False
    quantization_config: EGGSConfig

    def __init__(self, quantization_config: EGGSConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: PruneReport | None = None
        self._loading: PreTrainedModel | None = None

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
        if not self.pre_quantized:
            if hub_id(model.config._name_or_path):
                set_commit(model, next(iter(checkpoint_files or []), None))
            return
        pruned = self.quantization_config.pruned_modules
        if not pruned:
            raise CheckpointError(
                "config.json: quantization_config.pruned_modules is missing or empty, so it is not known which layers "
                "are packed; prune the model again"
            )
        stored = check_files(checkpoint_files or [], pruned)
        prefix = f"{model.base_model_prefix}."
        fused = [name.removeprefix(prefix) for name, module in model.named_modules() if is_fused_experts(module)]
        if any(f"{experts}." in name for name in pruned for experts in fused):
            split_experts(model)
            self._loading = model
        modules = dict(model.named_modules())
        for name, pattern in pruned.items():
            _swap_in(model, modules, name, NMPattern.parse(pattern), stored[name])

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Those of transformers, but for what makes 3-D parameters of experts that are split."""
        found = super().update_weight_conversions(weight_conversions, *model)  # older versions do not pass the model
        return found if self._loading is None else conversions_for(self._loading, found)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._loading = None
        _check_not_split(model, self.pre_quantized)  # older versions of transformers split it after the first look
        if self.pre_quantized:
            for name, layer in packed_layers(model).items():
                # A layer that is offloaded to disk has been checked by its shapes alone.
                if "meta" not in (layer.weight.device.type, layer.weight_meta.device.type):
                    check_packed_tensors(name, layer.weight, layer.weight_meta, layer.pattern)
            take_over(model)
            return model
        return self._prune(model)

    def _prune(self, model: PreTrainedModel) -> PreTrainedModel:
        from ..engine import calibrate_and_prune

        config = self.quantization_config
        tokenizer = config.tokenizer or _own_tokenizer(model, config)
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

    def is_serializable(self) -> bool:
        """Packed models are saved by `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: PEFT's LoRA is masked on packed layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without, too: the packed values are parameters like any other, and are trained under their mask."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed models are not compiled by `generate`."""
        return False


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


def _own_tokenizer(model: PreTrainedModel, config: EGGSConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the revision that `model` was loaded from, if the calibration source is text.

    Code that comes with it is run if that of the model was.
    """
    from ..calibration.windows import needs_tokenizer

    if not needs_tokenizer(config.calibration, config.text_column):
        return None
    revision = getattr(model.config, "_commit_hash", None)
    trusted = type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
    options = {"revision": revision} if revision else {}
    return load_tokenizer(model.config._name_or_path, token=config.token, trust_remote_code=trusted, **options)


def _swap_in(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    listed: str,
    pattern: NMPattern,
    stored: Mapping[str, TensorEntry],
) -> None:
    """Replace the dense layer that config.json calls `listed` by an empty packed one, which `stored` must fit."""
    prefix = f"{model.base_model_prefix}."
    # A base model is loaded from the checkpoint of a model with a head, or the other way round.
    name = next((n for n in (listed, listed.removeprefix(prefix), prefix + listed) if n in modules), None)
    if name is None:
        raise CheckpointError(
            f"{listed}: config.json lists it as pruned, and {type(model).__name__} has no such layer; load the model "
            "with the class it was saved from, and a mixture of experts with transformers 5.20 or later"
        )
    dense = modules[name]
    if not is_dense_linear(dense):
        raise CheckpointError(f"{name}: config.json lists it as pruned, and it is a {type(dense).__name__}, no linear")
    weight = dense_weight(dense)
    if weight.shape[1] % pattern.m:
        raise CheckpointError(
            f"{name}: config.json says {pattern}, and in_features={weight.shape[1]} is not a multiple of m={pattern.m}"
        )
    layer = NMLinear(
        weight.shape[1],
        weight.shape[0],
        dense.bias is not None,
        pattern,
        fan_in_fan_out=is_conv1d(dense),
        device=weight.device,
        dtype=weight.dtype,
    )
    if stored["weight"].shape != layer.weight.shape:
        raise CheckpointError(
            f"{name}: weight has shape {stored['weight'].shape}; in the {type(model).__name__} of config.json it must "
            f"be {tuple(layer.weight.shape)} at {pattern}; download the checkpoint again"
        )
    if layer.bias is not None and "bias" not in stored:
        raise CheckpointError(f"{name}: its bias is missing; download the checkpoint again")
    model.set_submodule(name, layer)


# transformers refuses to register a name twice, as a module that is run again would.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(EGGSConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(EGGSHfQuantizer)
