"""Adaptive pruning: channels and layers go while the network trains (Zhang et al.)."""

from layerlab_adaptive_pruning.method.folding import fold
from layerlab_adaptive_pruning.method.peers import NetworkSlimming, TorchPruning
from layerlab_adaptive_pruning.method.structure import rebuild, structure, trace
from layerlab_adaptive_pruning.method.surgery import below, merge_thin_layers, remove_channels, scales
from layerlab_adaptive_pruning.strategy import AdaptivePruning

__all__ = [
    "AdaptivePruning", "NetworkSlimming", "TorchPruning", "below", "fold", "merge_thin_layers", "rebuild",
    "remove_channels", "scales", "structure", "trace",
]  # fmt: skip
