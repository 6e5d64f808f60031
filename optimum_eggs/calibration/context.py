"""How many tokens a model reads at once."""

from __future__ import annotations

from typing import Any


def context_length(model: Any) -> int | None:
    """The positions that a model's configuration says it has, or None if it says nothing of that kind."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text_config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
