"""The strategy my-method for layerlab."""

from layerlab_my_method.strategy import MyMethod

__all__ = ["MyMethod"]
