"""Memory reorder (Ike et al., 2017) as a layerlab strategy."""

from layerlab_memory_reorder.strategy import MemoryReorder

__all__ = ["MemoryReorder"]
