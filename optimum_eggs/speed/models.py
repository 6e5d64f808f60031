"""A packed model against its dense twin: reading a prompt, writing tokens, and memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ..calibration.context import context_length
from ..devices import choose_device, device_map
from ..errors import ConfigError, ModelError
from ..hf.generation import compile_generation
from ..hf.loading import check_weights, load_config, load_model, model_class
from ..measure import devices_of
from ..memory import enough_memory
from ..nn import packed_layers
from ..ops import INSTRUCTION_SETS
from .layers import reading
from .parts import TokenParts, time_parts
from .timing import Seconds, alternate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READ = 1 << 29  # bytes that tell the memory's speed


@dataclass(frozen=True)
class ModelTiming:
    """What one model took. Speeds are in tokens per second, those of all sequences together; memory is in bytes.

    `resident` is what the process grew by from before loading to after the first use, when the model had been loaded,
    used and released once before: what libraries take for themselves is not counted. `weights` is what the weights
    themselves take; `packed` says whether any of them are, and `compiled` whether it decodes by `compile_generation`.
    """

    folder: str
    packed: bool
    compiled: bool
    sequences: int
    prefill: Seconds
    decode: Seconds
    prefill_speed: float
    decode_speed: float
    resident: int
    weights: int
    parts: TokenParts


@enough_memory("prompt", remedy="time fewer models at once")
def time_models(
    folders: list[str | Path],
    *,
    prompt: int = 256,
    new_tokens: int = 128,
    sequences: int = 1,
    repeats: int = 3,
    dtype: str = "auto",
    compiled: bool = False,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> list[ModelTiming]:
    """Load the models one after the other, to `device`, then time them in turn.

    Prefill is one forward pass over `prompt` random tokens, with the logits of the last alone where the model can do
    so, as in `generate`; decoding is `generate`, greedy, with a cache, of `new_tokens` tokens after a prompt of one.
    Both are of `sequences` sequences at once. With `compiled`, packed models decode by
    [`compile_generation`][optimum_eggs.compile_generation], which is done with before anything is timed. Code that
    comes with a model is run with `trust_remote_code` alone.

    Raises:
        ConfigError: as [`check_models`].
        ModelError: `compiled`, and a packed model cannot be.
        ModelError, CheckpointError: a folder cannot be loaded.
        OutOfMemoryError: there is not enough memory for all of them.
    """
    check_models(folders, prompt, new_tokens, trust_remote_code)
    where = choose_device(device)
    models, resident = [], []
    for folder in folders:
        _load_and_use(folder, dtype, where, trust_remote_code)
        gc.collect()
        before = psutil.Process().memory_info().rss
        models.append(_load_and_use(folder, dtype, where, trust_remote_code))
        resident.append(psutil.Process().memory_info().rss - before)

    packed = [bool(packed_layers(model)) for model in models]
    for model, is_packed in zip(models, packed, strict=True):
        if compiled and is_packed:
            compile_generation(model)
    prompts = [_tokens(model, sequences, prompt) for model in models]
    starts = [_tokens(model, sequences, 1) for model in models]
    prefills = [partial(_prefill, *pair) for pair in zip(models, prompts, strict=True)]
    decodes = [partial(_decode, *pair, new_tokens) for pair in zip(models, starts, strict=True)]
    devices = set().union(*map(devices_of, models))  # transformers' own quantizers choose theirs
    on_cpu = {device.type for device in devices} == {"cpu"}
    memory = [reading(_READ)] if INSTRUCTION_SETS and on_cpu else []  # in turn: a shared machine's speed changes
    prefill = alternate(prefills, repeats, devices=devices)
    decode = alternate([*decodes, *memory], repeats, devices=devices)
    bandwidth = _READ / decode.pop().median if memory else None
    return [
        ModelTiming(
            str(folder),
            is_packed,
            compiled and is_packed,
            sequences,
            first,
            second,
            sequences * prompt / first.median,
            sequences * new_tokens / second.median,
            grown,
            _weight_bytes(model),
            time_parts(model, second.median / new_tokens, start, max(repeats, 10), bandwidth),
        )
        for folder, model, is_packed, start, first, second, grown in zip(
            folders, models, packed, starts, prefill, decode, resident, strict=True
        )
    ]


def check_models(folders: list[str | Path], prompt: int, new_tokens: int, trust_remote_code: bool = False) -> None:
    """Look for the models, and see that what is to be timed fits their contexts, before anything is loaded.

    Raises:
        ConfigError: the prompt, or the tokens decoded after a prompt of one, are more than a model's context.
        ModelError: a folder is not that of a model, or the model does not write one token after the other.
        CheckpointError: a weight file is not there, or may not be read.
    """
    for folder in folders:
        check_weights(folder)
        config = load_config(folder, trust_remote_code)
        kind = model_class(config, trust_remote_code)
        if kind is not None and (config.is_encoder_decoder or not kind.can_generate()):
            raise ModelError(
                f"{folder}: a {kind.__name__} does not write token after token, so there is no decoding to time; time "
                "its layers alone, with --layers-only"
            )
        context = context_length(config)
        for flag, tokens, needed in (("prompt", prompt, prompt), ("new_tokens", new_tokens, new_tokens + 1)):
            if context is not None and needed > context:
                raise ConfigError(
                    f"{flag}={tokens} (--{flag.replace('_', '-')}) takes {needed} positions, and the context of "
                    f"{folder} has {context}; lower it"
                )


def _load_and_use(folder: str | Path, dtype: str, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    model = load_model(folder, dtype=dtype, device_map=device_map(device), trust_remote_code=trust_remote_code).eval()
    model.generation_config.eos_token_id = None  # no token ends what is timed
    _prefill(model, _tokens(model, 1, 2))  # a mapped file takes memory when it is first read
    return model


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights; tied ones, which share their memory, count once."""
    by_address = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(by_address.values())


def _tokens(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    config: Any = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (sequences, length), generator=generator).to(model.device)


@torch.no_grad()
def _prefill(model: Any, tokens: Tensor) -> None:
    model(input_ids=tokens, use_cache=True, **({"logits_to_keep": 1} if model._supports_logits_to_keep() else {}))


@torch.no_grad()
def _decode(model: Any, start: Tensor, new_tokens: int) -> None:
    model.generate(start, max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
