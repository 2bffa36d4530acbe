"""Which network, which of its activations, and how they are pooled. Importing it registers ``h2t_resnet20`` in timm."""

from h2t_store.network.finding_taps import find_taps
from h2t_store.network.loading import Backbone, code_digest, load_backbone
from h2t_store.network.taps import Pooled, Tap, pooled_layers, tapped

__all__ = ["Backbone", "Pooled", "Tap", "code_digest", "find_taps", "load_backbone", "pooled_layers", "tapped"]
