"""Compiled generation: what `generate` decodes with on a CPU, made one program by `torch.compile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from . import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model.generate` decode compiled, with a static cache and the attention `eggs`. Changes and returns `model`.

    The prompt is read as before. The first token after it waits for the compiler, up to a minute for a model of some
    billions of parameters, and again for another size of the cache or another number of sequences; torch keeps what it
    compiled for later processes. The settings are those of `model.generation_config`, which `generate` takes arguments
    over: `cache_implementation="dynamic"` decodes as before.

    Args:
        model: A packed model on the CPU that supports a static cache, as decoders of transformers do.

    Raises:
        ModelError: the model is not packed, or not on the CPU, or transformers cannot compile it.
    """
    from transformers import CompileConfig

    from .quantizer import EGGSHfQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, EGGSHfQuantizer):
        raise ModelError(
            f"{type(model).__name__} is not packed, so compiling it is up to torch.compile and transformers"
        )
    if model.device.type != "cpu":
        raise ModelError(
            f"compiled generation is for the CPU, and the model is on {model.device}; use generate() as it is"
        )
    if not model._can_compile_fullgraph:
        raise ModelError(f"transformers cannot compile {type(model).__name__} as a whole; use generate() as it is")
    model.set_attn_implementation(attention.NAME)
    config: Any = CompileConfig(mode="default")
    config._compile_all_devices = True  # it compiles for accelerators alone otherwise
    quantizer.compiles = True
    settings: Any = model.generation_config
    settings.cache_implementation, settings.compile_config = "static", config
    return model
