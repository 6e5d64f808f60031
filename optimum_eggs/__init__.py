"""N:M sparse language models with an expander-graph floor on connectivity.

Importing this package makes transformers know packed checkpoints, so that `from_pretrained` loads them, PEFT know
packed layers, so that a LoRA on them keeps their zeros, quanto leave them alone, and torch know the operation that they
call. Each is told when it is imported, be it before this package or after; until then nothing heavy is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .imports import after_import
from .version import __version__

if TYPE_CHECKING:
    from .config import EGGSConfig
    from .hf.generation import compile_generation
    from .importance import register_importance
    from .nn import NMLinear
    from .pattern import NMPattern
    from .pruner import EGGSPruner

__all__ = [
    "EGGSConfig",
    "EGGSPruner",
    "NMLinear",
    "NMPattern",
    "__version__",
    "compile_generation",
    "register_importance",
]

_HOME = {
    "EGGSConfig": "config",
    "EGGSPruner": "pruner",
    "NMLinear": "nn",
    "NMPattern": "pattern",
    "compile_generation": "hf.generation",
    "register_importance": "importance",
}

# transformers.quantizers, and not the registry within it: our quantizer imports both, and nothing that comes later.
after_import("torch", f"{__name__}.ops")
after_import("transformers.quantizers", f"{__name__}.hf.quantizer")
after_import("transformers.modeling_utils", f"{__name__}.hf.saving", f"{__name__}.hf.attention")
after_import("peft.tuners.lora.model", f"{__name__}.recovery.install")
if importlib.util.find_spec("optimum.quanto"):
    after_import("optimum.quanto", f"{__name__}.nn.quanto")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals() | _HOME)
