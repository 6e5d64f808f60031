"""Operations on packed matrices."""

from . import packed_linear as packed_linear
from . import packed_linears as packed_linears
from .attend import attend
from .layout import gather, spread
from .library import register
from .native import INSTRUCTION_SETS
from .nm_linear import nm_linear
from .select import BACKENDS, Choice, choose, explain, force, publish

without_kernels: str | None = register()
"""Why compiled models call the kernels by way of Python, if they do."""
publish()

__all__ = [
    "BACKENDS",
    "INSTRUCTION_SETS",
    "Choice",
    "attend",
    "choose",
    "explain",
    "force",
    "gather",
    "nm_linear",
    "spread",
    "without_kernels",
]
