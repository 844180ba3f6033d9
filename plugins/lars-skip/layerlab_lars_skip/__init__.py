"""Layer skip learning with LARS variables (Miyauchi et al., 2018) as a layerlab strategy."""

from layerlab_lars_skip.strategy import LarsSkip

__all__ = ["LarsSkip"]
