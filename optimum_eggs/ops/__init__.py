"""Operations on packed matrices."""

from .layout import gather, spread
from .native import INSTRUCTION_SETS
from .nm_linear import nm_linear
from .select import BACKENDS, Choice, choose, explain, force

__all__ = ["BACKENDS", "INSTRUCTION_SETS", "Choice", "choose", "explain", "force", "gather", "nm_linear", "spread"]
