"""Learn&Drop (Cruciata et al., arXiv 2604.23403) as a layerlab strategy."""

from layerlab_learn_and_drop.strategy import LearnAndDrop, SameLayersFrozen

__all__ = ["LearnAndDrop", "SameLayersFrozen"]
