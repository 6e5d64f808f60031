"""Operations on packed matrices."""

from .native import INSTRUCTION_SETS
from .nm_linear import nm_linear
from .select import BACKENDS, Choice, choose, explain, force

__all__ = ["BACKENDS", "INSTRUCTION_SETS", "Choice", "choose", "explain", "force", "nm_linear"]
