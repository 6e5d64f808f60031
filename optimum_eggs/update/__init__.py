"""Weight updates: what the surviving weights become, given a mask or together with it."""

from .admm import admm
from .descent import coordinate_descent
from .objective import relative_error
from .refit import masked_refit
from .sparsegpt import sparsegpt
from .target import corrected_target

__all__ = ["admm", "coordinate_descent", "corrected_target", "masked_refit", "relative_error", "sparsegpt"]
