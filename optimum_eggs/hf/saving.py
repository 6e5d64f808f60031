"""What transformers saves of a model, made right where packing is concerned; imported once its models are.

By itself it drops the state dict that is passed for a model with a quantizer, and for a dense model that was made from
a packed one's configuration it writes that.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from ..config import QUANT_METHOD
from ..errors import ModelError
from ..nn import MatrixNorm, coded_modules, packed_layers
from .quantizer import EGGSHfQuantizer

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP, activation checkpointing and compilation put into the names of modules, and not into those of a state dict
that is gathered to be saved."""


@contextmanager
def _saved_instead(quantizer: EGGSHfQuantizer, state_dict: Any) -> Iterator[None]:
    """Have `state_dict` saved in place of the model's own, if it is given."""
    quantizer.to_save = state_dict
    try:
        yield
    finally:
        quantizer.to_save = None


@contextmanager
def _listed_as_it_is(model: PreTrainedModel, state_dict: Any) -> Iterator[None]:
    """List the layers that are packed in what is saved: the model may have been changed by hand since it was made."""
    config = model.config.quantization_config
    stored = {
        key: getattr(config, key) for key in ("pruned_modules", "coded_modules", "matrix_norms", "format_version")
    }
    pruned = {_WRAPPERS.sub("", name): str(layer.pattern) for name, layer in packed_layers(model).items()}
    coded = {_WRAPPERS.sub("", name): str(module.coding) for name, module in coded_modules(model).items()}
    if state_dict is not None:
        pruned = {name: pattern for name, pattern in pruned.items() if f"{name}.weight_meta" in state_dict}
        coded = {name: coding for name, coding in coded.items() if f"{name}.weight_scale" in state_dict}
    norms = [_WRAPPERS.sub("", name) for name, module in model.named_modules() if isinstance(module, MatrixNorm)]
    config.list_modules(pruned, coded, norms)
    try:
        yield
    finally:
        vars(config).update(stored)


@contextmanager
def _called_dense(model: PreTrainedModel) -> Iterator[None]:
    """Leave a packed model's `quantization_config` out of the configuration of a model without packed layers."""
    stored = getattr(model.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method != QUANT_METHOD or packed_layers(model):
        yield
        return
    left = next(iter(coded_modules(model)), None)
    if left is not None:
        raise ModelError(
            f"{left} holds integers, and no layer is packed any more, so that neither a packed nor a dense model would "
            "be saved; make all of it dense with dequantize()"
        )
    del model.config.quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = stored


def _wrap(kind: Any) -> None:
    save = kind.save_pretrained
    if getattr(save, "knows_packed_models", False):
        return
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        quantizer = getattr(self, "hf_quantizer", None)
        with ExitStack() as stack:
            if isinstance(quantizer, EGGSHfQuantizer):
                given = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
                stack.enter_context(_saved_instead(quantizer, given))
                if packed_layers(self):
                    stack.enter_context(_listed_as_it_is(self, given))
            stack.enter_context(_called_dense(self))
            save(self, *args, **kwargs)

    save_pretrained.knows_packed_models = True  # type: ignore[attr-defined]
    kind.save_pretrained = save_pretrained


_wrap(PreTrainedModel)
