"""Low-bit training (Ike et al., 2017) as a layerlab strategy."""

from layerlab_low_bit.method.fixedpoint import decode, encode, msb_histogram
from layerlab_low_bit.strategy import LowBit

__all__ = ["LowBit", "decode", "encode", "msb_histogram"]
