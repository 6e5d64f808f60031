"""Compiled generation: what `generate` decodes with on a CPU, made one program by `torch.compile`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..huge_pages import use_huge_pages
from . import attention
from .program import compiled_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OURS = "_of_compile_generation"  # an attribute that tells our settings of compilation from a caller's


def compile_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model.generate` decode compiled, with a static cache and the attention `eggs`. Changes and returns `model`.

    The prompt is read as before. The first token after it waits for the compiler, up to a minute for a model of some
    billions of parameters, and again for another size of the cache or another number of sequences; torch keeps what it
    compiled for later processes. A call that names a cache of its own (`cache_implementation`, `past_key_values`,
    `use_cache=False`) is not compiled. What is saved is as if this had not been called. On Linux the
    weights are moved from the file, whose mapping processes share, into huge pages of this
    one.

    Args:
        model: A packed model on the CPU. Of the types that `optimum_eggs.hf.attention.KNOWN` lists it gets the
            attention `eggs`; others keep theirs.

    Raises:
        ModelError: the model is not packed, or not on the CPU, or transformers cannot compile it.
        OutOfMemoryError: there is not enough memory for its weights beside what is mapped.
    """
    from .quantizer import EGGSHfQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, EGGSHfQuantizer):
        raise ModelError(f"{type(model).__name__} is not packed; generate() compiles other models by its own settings")
    if model.device.type != "cpu":
        raise ModelError(
            f"the model is on {model.device}, and generation is compiled on the CPU; use generate() as it is"
        )
    if not model._can_compile_fullgraph or "llama4" in model.config.model_type:  # transformers runs that one eagerly
        raise ModelError(f"transformers cannot compile {type(model).__name__} as a whole; use generate() as it is")
    if not quantizer.compiles:
        use_huge_pages(model)
    if model.config.model_type in attention.KNOWN and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)
    quantizer.compiles = True
    vars(model).update(generate=partial(_generate, model), get_compiled_call=partial(_compiled_call, model))
    return model


# With a draft the cache is cut back, which a static one cannot always be.
_OF_OTHERS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "disable_compile")


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    settings = given or model.generation_config
    own = {"cache", "past_key_values", "cache_implementation", "compile_config"} & kwargs.keys()
    own |= {"compile_config"} if settings.compile_config is not None else set()
    own |= {name for name in _OF_OTHERS if kwargs.get(name, getattr(settings, name, None))}
    cached = kwargs.get("use_cache", settings.use_cache) is not False
    cached &= settings.cache_implementation in (None, "hybrid")  # which transformers takes for None now
    if cached and not own and model.device.type == "cpu":
        kwargs |= {"cache_implementation": "static", "compile_config": _settings()}
    return type(model).generate(model, *args, **kwargs)


def _settings() -> Any:
    from transformers import CompileConfig

    settings: Any = CompileConfig(mode="default")
    settings._compile_all_devices = True  # it compiles for accelerators alone otherwise
    setattr(settings, _OURS, True)
    return settings


def _compiled_call(model: Any, compile_config: Any) -> Any:
    """What `generate` decodes with: for a configuration of the caller's, what transformers makes of it."""
    if hasattr(compile_config, _OURS):
        return compiled_step(model)
    # What transformers keeps compiled is bound to one model, and a copy of the model has it too.
    if vars(model).get("_compiled_for") != id(model):
        vars(model).pop("_compiled_call", None)
        vars(model)["_compiled_for"] = id(model)
    return type(model).get_compiled_call(model, compile_config)
