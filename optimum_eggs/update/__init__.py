"""Weight updates: what the surviving weights become, given a mask."""

from .refit import masked_refit, relative_error

__all__ = ["masked_refit", "relative_error"]
