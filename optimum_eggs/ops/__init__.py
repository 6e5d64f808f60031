"""Operations on packed matrices."""

from .nm_linear import nm_linear

__all__ = ["nm_linear"]
