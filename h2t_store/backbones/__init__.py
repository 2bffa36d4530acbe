"""Which network, which of its activations, and how they are pooled.

Importing it registers ``h2t_resnet20`` with timm.
"""

from h2t_store.backbones.registry import Backbone, load_backbone
from h2t_store.backbones.taps import PRESETS, Tap, find_taps, tapped

__all__ = ["PRESETS", "Backbone", "Tap", "find_taps", "load_backbone", "tapped"]
