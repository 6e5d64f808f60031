"""LoRA on a packed layer: what it adds is masked while it trains, so merging changes nothing where nothing is kept."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from ..errors import ConfigError
from ..hf.offload import onloaded
from ..nn import CodedLinear, NMLinear, RoundedLinear, is_packed
from ..ops import nm_linear
from .low_rank import masked_low_rank

# Initialisations that only fill A and B. The others change the base weight, or start from its dense form.
_INITIALISATIONS = (True, False, "gaussian")


class MaskedLoraLinear(LoraLinear):
    """PEFT's LoRA layer for a packed layer: y = x (W + s · mask∘(BA))ᵀ + b, s the scaling.

    Made by PEFT for every packed layer that a `LoraConfig` names. Merging adds s · mask∘(BA) to the packed values, in
    the dtype of the layer; the mask and the shape stay as they are. Values that are integers are rounded again,
    up or down by a draw, so that what is smaller than half a step is there on average: the layer's `merge_error` says
    how far they are from the sum.

    Raises:
        ConfigError: the configuration asks for a variant or an initialisation that does not keep the mask.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) to (..., out).

        Where the layer is float32 and nothing tells the adapters' input from the layer's, the masked deltas are added
        to the packed values and multiplied together: one product instead of one for each adapter.
        """
        base: Any = self.base_layer  # packed, or another adapter's layer
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        plain = isinstance(base, NMLinear) and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or not all(map(self._adds_to_weight, adapters)):
            return super().forward(x, *args, **kwargs)
        with onloaded(base, *(factor[name] for name in adapters for factor in (self.lora_A, self.lora_B))):
            weight, bias = base.weight, base.bias
            for name in adapters:
                weight = weight + packed_delta(self, name)
                if (own := self.lora_B[name].bias) is not None:
                    own = own * self.scaling[name]
                    bias = own if bias is None else bias + own
            if isinstance(base, RoundedLinear):
                weight = base.rounded(weight)
            return nm_linear(x, weight, base.weight_meta, bias, base.pattern.n, base.pattern.m)

    def _adds_to_weight(self, adapter: str) -> bool:
        """Whether the adapter may be added to the weight: same input, and no narrow dtype that would round it away."""
        dropout, dtype = self.lora_dropout[adapter], self.get_base_layer().weight.dtype
        drops = self.training and not isinstance(dropout, torch.nn.Identity)
        return not drops and dtype == torch.float32 == self.lora_A[adapter].weight.dtype

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant:
        """The masked variant, unless the configuration asks for another one."""
        wanted = super().resolve_lora_variant(config=config, **kwargs)
        if wanted is not None:
            raise ConfigError(
                f"{type(wanted).__name__} of LoRA does not keep the zeros of a packed layer; use a plain LoraConfig, "
                "or make the model dense first with model.dequantize()"
            )
        if config.init_lora_weights not in _INITIALISATIONS:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} starts from the dense weight or changes it, which "
                f"a packed layer does not have; use one of {list(_INITIALISATIONS)}"
            )
        return MaskedVariant()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge. Of a layer of integers it is always a safe one: what it becomes is looked at before it is put.

        Raises:
            ConfigError: an adapter has a bias, and the layer none.
            ValueError: what the layer would become is not finite.
        """
        base: Any = self.get_base_layer()
        for name in self.active_adapters if adapter_names is None else adapter_names:
            own: Any = self.lora_B[name].bias if name in self.lora_B else None
            if own is None:
                continue
            if base.bias is None:
                raise ConfigError(
                    f"the adapter {name!r} has a bias (lora_bias=True), and the layer that it would be merged into has "
                    "none; train one with lora_bias=False"
                )
            if safe_merge and not bool(torch.isfinite(own).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        # PEFT's own safe merge casts the bias to the dtype of the weight
        super().merge(safe_merge and not isinstance(base, CodedLinear), adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The product BA times the scaling (out, in), of which the layer adds what its mask keeps.

        PEFT takes it apart again to combine adapters.
        """
        with onloaded(self.lora_A[adapter], self.lora_B[adapter]):
            return super().get_delta_weight(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: a masked product has no low rank of its own."""
        return False

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ConfigError(
            "adapter_names: several adapters in one batch do not work on packed layers; merge one, or call each"
        )


class MaskedVariant(LoraVariant):
    """What PEFT calls where its plain LoRA would add B(A(x))."""

    def supports_lora_conversion(self) -> bool:
        """No."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beyond A and B."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG004
        """The result with the adapter's share added. Memory beyond the activations: the packed delta."""
        base, up = module.get_base_layer(), module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        with onloaded(base, module.lora_A[active_adapter], up):
            delta = packed_delta(module, active_adapter)
            bias = None if up.bias is None else up.bias * module.scaling[active_adapter]
            return result + nm_linear(x, delta, base.weight_meta, bias, base.pattern.n, base.pattern.m)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """New packed values."""
        if isinstance(module.get_base_layer(), CodedLinear):
            return _merge_rounded(module, active_adapter)
        return orig_weight + _delta_in(orig_weight, module, active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add to the packed values in place."""
        if isinstance(module.get_base_layer(), CodedLinear):
            orig_weight.data = _merge_rounded(module, active_adapter)
            return
        orig_weight.data = orig_weight.data + _delta_in(orig_weight, module, active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The packed values without the adapter, up to rounding; integers are those of before the merge."""
        base = module.get_base_layer()
        if isinstance(base, CodedLinear):
            codes, base.weight_scale, base.merge_error = module.before_merge.pop(active_adapter)
            return codes
        return orig_weight.data - _delta_in(orig_weight, module, active_adapter)


@torch.no_grad()
def _merge_rounded(module: Any, adapter: str) -> Tensor:
    """Put the scales of a coded layer's values with the adapter's share into the layer, and return their codes.

    What was there is kept, since rounding cannot be undone.
    """
    base = module.get_base_layer()
    values = base.kept_values() + packed_delta(module, adapter).to(torch.float32)
    if not bool(torch.isfinite(values).all()):  # what PEFT looks for in a merged weight, which is integers here
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
    before = base.weight.data, base.weight_scale, base.merge_error
    module.before_merge = getattr(module, "before_merge", {}) | {adapter: before}
    codes, base.weight_scale, base.merge_error = base.encode(values)
    warnings.warn(
        "merging into layers of integers rounds the sum; each layer's `merge_error` says how far it is from it",
        stacklevel=2,
    )
    return codes


def packed_delta(module: Any, adapter: str) -> Tensor:
    """S · mask∘(BA) at the kept positions, packed, in the dtype of A and B even under autocast."""
    base, factors = module.get_base_layer(), (module.lora_A[adapter], module.lora_B[adapter])
    with onloaded(base, *factors):
        down, up = factors[0].weight, factors[1].weight * module.scaling[adapter]
        with torch.autocast(down.device.type, enabled=False):
            return masked_low_rank(down, up, base.weight_meta, base.pattern)


@torch.no_grad()
def _delta_in(weight: Tensor, module: Any, adapter: str) -> Tensor:
    return packed_delta(module, adapter).to(weight.dtype)


def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> MaskedLoraLinear | None:
    """A masked LoRA layer if the target is a packed layer, or one that holds another adapter already; else None.

    Raises:
        ConfigError: `target_parameters` names a parameter of a packed layer.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if not is_packed(base):
        return None
    if kwargs.pop("parameter_name", None) is not None:
        raise ConfigError("target_parameters names a packed weight, whose shape is not the layer's; use target_modules")
    return MaskedLoraLinear(target, adapter_name, config=config, **kwargs)
