"""How fast packed layers and packed models are on this machine, beside dense ones."""

from .layers import LayerTiming, read_bandwidth, time_layer
from .models import ModelTiming, time_models

__all__ = ["LayerTiming", "ModelTiming", "read_bandwidth", "time_layer", "time_models"]
