"""What a model's configuration says of its language model."""

from __future__ import annotations

from typing import Any


def text_config(model: Any) -> Any:
    """The configuration of a model's language model, which may be a part of its own; None if it has none at all."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """The positions that a model's configuration says it has, or None if it says nothing of that kind."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
