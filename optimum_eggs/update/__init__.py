"""Weight updates: what the surviving weights become, given a mask or together with it."""

from .admm import admm
from .objective import relative_error
from .problem import Problem
from .refit import masked_refit
from .sparsegpt import sparsegpt
from .target import corrected_target

__all__ = ["Problem", "admm", "corrected_target", "masked_refit", "relative_error", "sparsegpt"]
