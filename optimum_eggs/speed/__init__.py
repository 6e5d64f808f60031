"""How fast packed layers and packed models are on this machine, beside dense ones."""

from .layers import LayerTiming, read_bandwidth, time_layer
from .models import ModelTiming, check_models, time_models
from .parts import TokenParts

__all__ = ["LayerTiming", "ModelTiming", "TokenParts", "check_models", "read_bandwidth", "time_layer", "time_models"]
