"""N:M sparse language models with an expander-graph floor on connectivity.

Importing this package makes transformers know packed checkpoints, so that `from_pretrained` loads them, and PEFT know
packed layers, so that a LoRA on them keeps their zeros.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .hf.quantizer import register
from .recovery import install_in_peft
from .version import __version__

if TYPE_CHECKING:
    from .config import EGGSConfig
    from .importance import register_importance
    from .nn import NMLinear
    from .pattern import NMPattern
    from .pruner import EGGSPruner

__all__ = ["EGGSConfig", "EGGSPruner", "NMLinear", "NMPattern", "__version__", "register_importance"]

_HOME = {
    "EGGSConfig": "config",
    "EGGSPruner": "pruner",
    "NMLinear": "nn",
    "NMPattern": "pattern",
    "register_importance": "importance",
}

register()
install_in_peft()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals() | _HOME)
