"""Making a pruned model one that transformers knows how to save, and dense again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import EGGSConfig
from ..nn import NMLinear
from ..nn.experts import join_experts

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
    share_with_card(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def share_with_card(model: PreTrainedModel) -> None:
    """Make `model.push_to_hub` end with this package's card; transformers would write its template over it."""
    model.push_to_hub = partial(_push_to_hub, model)  # type: ignore[assignment]


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> str:
    from ..sharing.models import push_model

    return push_model(model, repo_id, **options)


def packed_layers(model: nn.Module) -> dict[str, NMLinear]:
    """The packed layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}


@torch.no_grad()
def unpack_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every packed layer by the dense layer it came from, zeros in place. Changes and returns `model`."""
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_original().to(dtype or layer.weight.dtype))
    join_experts(model)
    return model
