"""FreezeOut (Brock et al., 2017) as a layerlab strategy."""

from freezeout.strategy import FreezeOut

__all__ = ["FreezeOut"]
