"""The engine: a model, a configuration and calibration windows in; the model pruned and a report out."""

from .pack import pack_model
from .plan import PrunePlan, make_plan
from .prune import prune_model
from .report import DenseLayer, LayerReport, PruneReport
from .run import calibrate_and_prune

__all__ = [
    "DenseLayer",
    "LayerReport",
    "PrunePlan",
    "PruneReport",
    "calibrate_and_prune",
    "make_plan",
    "pack_model",
    "prune_model",
]
