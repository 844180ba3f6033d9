"""Plugin comm-overlap: data-parallel training that hides its communication (Ike et al., 2017, section 3)."""

from layerlab_comm_overlap.method.launcher import launch
from layerlab_comm_overlap.strategy import CommOverlap

__all__ = ["CommOverlap", "launch"]
