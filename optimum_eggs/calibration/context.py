"""What a model's configuration says of its language model."""

from __future__ import annotations

from typing import Any

from ..errors import CalibrationError


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
