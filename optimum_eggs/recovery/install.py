"""Making PEFT know packed layers; imported once PEFT's LoRA is, whichever of the two packages comes first.

PEFT has no public way to add a layer type that also holds when an adapter is loaded again (`_register_custom_module`
is not saved). So the last of its dispatchers for LoRA is wrapped, and the other adapters are refused on packed layers,
since they would fill the zeros; and what it does for experts held as 3-D parameters is left out where they are split.
"""

from __future__ import annotations

import functools
from typing import Any

import peft.tuners.lora.model as lora_model

from ..errors import ConfigError
from ..nn.experts import conversions_for, has_split_experts

_PLAIN = ("LORA",)


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
    from peft.tuners.tuners_utils import BaseTuner

    _filter_conversions(integration)

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        kind = str(getattr(self.peft_config[adapter_name].peft_type, "value", self.peft_config[adapter_name].peft_type))
        if kind not in _PLAIN:
            _refuse_packed_layers(model, kind)
        if has_split_experts(model):
            _leave_split_experts()
        return inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


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


def _refuse_packed_layers(model: Any, kind: str) -> None:
    from ..nn import NMLinear

    name = next((name for name, layer in model.named_modules() if isinstance(layer, NMLinear)), None)
    if name is not None:
        raise ConfigError(
            f"{kind} adapters do not keep the zeros of packed layers, and {name} is one; use a LoraConfig, or make the "
            "model dense first with model.dequantize()"
        )


_wrap(lora_model)
