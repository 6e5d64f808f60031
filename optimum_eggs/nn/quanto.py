"""Making quanto leave packed layers alone; imported once quanto is.

quanto takes every instance of `nn.Linear` for a dense one, and knows no mark. In its table of layers the first entry
that fits decides, so ours comes first.
"""

from __future__ import annotations

import sys
from typing import Any

from .coded import CodedLinear
from .embedding import CodedEmbedding
from .linear import NMLinear

_OURS = (NMLinear, CodedLinear, CodedEmbedding)


class _LeftAlone:
    """Stands where quanto expects the class of a quantised layer."""

    @classmethod
    def from_module(cls, module: Any, **options: Any) -> None:
        """None, as of a layer that is not to be quantised."""


def _put_first(table: dict[type, Any]) -> None:
    others = {kind: made for kind, made in table.items() if kind not in _OURS}
    table.clear()
    table.update({**dict.fromkeys(_OURS, _LeftAlone), **others})


if "optimum.quanto" in sys.modules:
    _put_first(sys.modules["optimum.quanto.nn.qmodule"]._QMODULE_TABLE)
