"""What a model and its configuration say of how it reads text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, ModelError


def text_config(model: Any) -> Any:
    """The configuration of a model's language model, which may be a part of its own; None if it has none at all.

    `model` may be the model's configuration itself.
    """
    config: Any = model if hasattr(model, "get_text_config") else getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """The positions that a model's configuration says it has, or None if it says nothing of that kind."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_context(model: Any, seq_len: int) -> None:
    """Raise if windows of `seq_len` tokens are longer than the model's context.

    Raises:
        CalibrationError: they are.
    """
    context = context_length(model)
    if context is not None and seq_len > context:
        raise CalibrationError(f"seq_len={seq_len} is more than the model's context of {context} tokens; lower seq_len")


def check_vocabulary(model: Any, ids: Tensor) -> None:
    """Raise unless token ids are of the model's vocabulary.

    Raises:
        CalibrationError: one is not.
    """
    vocabulary = getattr(text_config(model), "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise CalibrationError(
            f"token ids run from {low} to {high}, and the model's vocabulary has {vocabulary}; use the model's own "
            "tokenizer"
        )


def check_reads_text(model: Any) -> None:
    """Raise unless a model reads token ids, which calibration is on.

    Raises:
        ModelError: it reads images or sound.
    """
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids" and "input_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__} reads {reads}, and calibration is on text; it can only be packed as it is, with "
            "zeros that another method has put into it"
        )


def text_inputs(model: Any, window: Tensor) -> dict[str, Tensor]:
    """The arguments by which a model reads windows (batch, tokens) of text.

    The decoder of an encoder-decoder reads the same text behind its start token, as when it is trained to write it.
    """
    inputs = {"input_ids": window}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        named = (getattr(model.config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        start = next((token for token in named if token is not None), 0)
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(window[:, :1], start), window[:, :-1]], dim=1)
    return inputs
