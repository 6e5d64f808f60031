"""Making PEFT know packed layers; imported once PEFT's LoRA is, whichever of the two packages comes first.

PEFT has no public way to add a layer type that also holds when an adapter is loaded again (`_register_custom_module`
is not saved). So the last of its dispatchers for LoRA is wrapped, and the other adapters are refused on packed layers,
since they would fill the zeros; and what it does for experts held as 3-D parameters is left out where they are split.
A configuration has no place for what is not its field either, so what writes and reads it is wrapped, to hold that the
adapter is masked.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft.tuners.lora.model as lora_model
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import CONFIG_NAME
from torch import nn

from ..errors import ConfigError
from ..hf.offload import is_offloaded, onloaded
from ..nn import CodedEmbedding, CodedLinear, is_packed
from ..nn.experts import SplitExperts, conversions_for, has_split_experts

_PLAIN = ("LORA",)
_MASKED = "optimum_eggs_masked"
"""The key of adapter_config.json, and the attribute of a configuration. Without this package, PEFT names it as one that
it does not know, and goes on."""


def _wrap(module: Any) -> None:
    if getattr(module.dispatch_default, "knows_packed_layers", False):
        return
    plain = module.dispatch_default

    @functools.wraps(plain)
    def dispatch_default(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        from .lora import dispatch

        made = dispatch(target, adapter_name, config, **kwargs)
        return made if made is not None else plain(target, adapter_name, config, **kwargs)

    dispatch_default.knows_packed_layers = True  # type: ignore[attr-defined]
    module.dispatch_default = dispatch_default

    import transformers.integrations.peft as integration

    _filter_conversions(integration)
    _wrap_injection()
    _wrap_creation(module.LoraModel)
    _wrap_configuration(module.LoraConfig)


def _wrap_injection() -> None:
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        _refuse_packed_layers(self, model, config, kwargs.get("state_dict"))
        if has_split_experts(model):
            _leave_split_experts()
        result = inject(self, model, adapter_name, *args, **kwargs)
        _note_mask(model, adapter_name, config)
        return result

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def _wrap_creation(kind: Any) -> None:
    """Have the weights of an offloaded layer there while its adapter is made: PEFT puts that where they are."""
    create = kind._create_and_replace

    @functools.wraps(create)
    def create_and_replace(self: Any, config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        base = _base(target)
        with onloaded(*([base] if is_offloaded(base) and _is_packed(self.model) else [])):
            create(self, config, adapter_name, target, *args, **kwargs)

    kind._create_and_replace = create_and_replace


def _wrap_configuration(kind: Any) -> None:
    """Write into adapter_config.json whether the adapter is masked, and read it again."""
    save, from_type = kind.save_pretrained, PeftConfigMixin.from_peft_type.__func__  # type: ignore[attr-defined]

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        save(self, save_directory, **kwargs)
        if getattr(self, _MASKED, False):  # not in to_dict, which its constructor is to take
            file = Path(save_directory) / CONFIG_NAME
            written = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(written | {_MASKED: True}, indent=2, sort_keys=True), encoding="utf-8")

    @functools.wraps(from_type)
    def from_peft_type(cls: Any, **kwargs: Any) -> Any:
        masked = kwargs.pop(_MASKED, False)
        config = from_type(cls, **kwargs)
        if masked:
            setattr(config, _MASKED, True)
        return config

    kind.save_pretrained = save_pretrained
    PeftConfigMixin.from_peft_type = classmethod(from_peft_type)  # type: ignore[assignment]


def _note_mask(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Mark the configuration of an adapter that was just put on packed layers; warn if it was, and now is on none."""
    from .lora import MaskedLoraLinear

    layers = (module for module in model.modules() if isinstance(module, MaskedLoraLinear))
    if any(adapter_name in layer.lora_A for layer in layers):
        setattr(config, _MASKED, True)
    elif getattr(config, _MASKED, False):
        warnings.warn(
            f"the adapter {adapter_name!r} was made on packed layers, where it is masked, and none that it is put on "
            "here is packed, so it fills the zeros and computes something else; merge it on the packed model first "
            "(merge_and_unload()), and make that one dense with dequantize()",
            stacklevel=4,
        )


def _leave_split_experts() -> None:
    """Keep PEFT from taking what names an expert's layer for a part of a 3-D parameter, in models where it is none."""
    import peft.utils.transformers_weight_conversion as conversion

    change_config = conversion.convert_peft_config_for_transformers
    if getattr(change_config, "knows_split_experts", False):
        return

    @functools.wraps(change_config)
    def convert_config(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not has_split_experts(model):
            change_config(peft_config, model, *args, **kwargs)

    convert_config.knows_split_experts = True  # type: ignore[attr-defined]
    conversion.convert_peft_config_for_transformers = convert_config
    _filter_conversions(conversion)


def _filter_conversions(module: Any) -> None:
    """Have `module` find the conversions of a model as [`conversions_for`] says."""
    find = module.get_model_conversion_mapping

    @functools.wraps(find)
    def get_model_conversion_mapping(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return conversions_for(model, find(model, *args, **kwargs))

    module.get_model_conversion_mapping = get_model_conversion_mapping


def _refuse_packed_layers(tuner: Any, model: nn.Module, config: Any, state_dict: dict[str, Any] | None) -> None:
    """Raise, before anything is changed, if an adapter that does not keep zeros would be put on a packed layer.

    Raises:
        ConfigError: it would.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    _refuse_integers(tuner, model, config, kind, state_dict)
    if kind in _PLAIN or not _is_packed(model):
        return
    name = next(_packed_targets(tuner, model, config, kind, state_dict), None)
    if name is not None:
        packed = is_packed(_base(model.get_submodule(name)))
        what = "which is packed" if packed else "an expert beside packed ones"
        raise ConfigError(
            f"{kind} adapters do not keep the zeros of packed layers, and would be put on {name}, {what}; use a "
            "LoraConfig, or name target_modules that are dense, or make the model dense first with model.dequantize()"
        )


def _refuse_integers(tuner: Any, model: nn.Module, config: Any, kind: str, state_dict: dict[str, Any] | None) -> None:
    """Raise if an adapter would change integers that are not packed, as those of a head, or a copy would be trained.

    Raises:
        ConfigError: it would.
    """
    integers = [
        name
        for name, module in model.named_modules()
        if isinstance(_base(module), CodedLinear | CodedEmbedding) and not is_packed(_base(module))
    ]
    if not integers:
        return
    copied = [*(getattr(config, "modules_to_save", None) or [])]
    tokens = getattr(config, "trainable_token_indices", None)
    copied += [] if tokens is None else list(tokens) if isinstance(tokens, dict) else ["embed_tokens"]
    name = next((name for name in integers if any(name.split(".")[-1] == each.split(".")[-1] for each in copied)), None)
    name = name or next(_targets(tuner, model, config, kind, state_dict, integers), None)
    if name is not None:
        raise ConfigError(
            f"{kind} would be put on {name}, which holds integers, is not packed and is not trained; leave it out of "
            "target_modules and modules_to_save, or make the model dense first with model.dequantize()"
        )


def _packed_targets(
    tuner: Any, model: nn.Module, config: Any, kind: str, state_dict: dict[str, Any] | None
) -> Iterator[str]:
    """Names of the packed layers, and the layers of experts beside packed ones, that an adapter would be put on."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SplitExperts))
    packed = [
        name
        for name, module in model.named_modules()
        if is_packed(_base(module)) or (name.startswith(experts) and isinstance(_base(module), nn.Linear))
    ]
    yield from _targets(tuner, model, config, kind, state_dict, packed)


def _targets(
    tuner: Any, model: nn.Module, config: Any, kind: str, state_dict: dict[str, Any] | None, packed: list[str]
) -> Iterator[str]:
    """Those of the named modules that an adapter would be put on."""
    if kind == "XLORA":  # it mixes the adapters that lie on any layer, and asks none of them for its product
        yield from packed
    elif state_dict is not None:
        prefixes = {key.rpartition(f".{tuner.prefix}")[0] for key in state_dict}
        yield from (name for name in packed if name in prefixes)
    else:
        config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        for name in packed:
            found = tuner._check_target_module_exists(config, name)
            if found:  # what tells that it is excluded is false
                yield name


def _base(module: Any) -> Any:
    """The layer under all adapters."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _is_packed(model: nn.Module) -> bool:
    return any(map(is_packed, model.modules()))


_wrap(lora_model)
