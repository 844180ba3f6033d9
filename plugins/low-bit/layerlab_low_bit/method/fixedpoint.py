"""Fixed point with one power-of-two scale a tensor: histogram of most significant bits, encoding, decoding.

A tensor of b bits is integers c with |c| < 2**(b-1), which stand for c * 2**exponent. The *position* p is that of the
most significant bit that the format still holds: exponent = p - (b - 2), so that every |x| < 2**(p+1) fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from layerlab import LayerlabError

BINS = 256
BIAS = 127
"""Bin e of a histogram counts values whose most significant bit is at position e - BIAS."""
NOT_FINITE = BINS - 1
LOWEST = -100
"""No position below this: scales stay normal float32 numbers at all widths."""
_CHUNK = 2**18
"""Elements of a piece on the CPU: its few passes then stay in the cache."""


def _flat(values: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    return values.as_strided((values.numel(),), (1,), values.storage_offset())


def dense(values: Tensor) -> Tensor:
    """The tensor itself if its elements fill one piece of memory, in whatever order of dimensions; else a copy."""
    strides = sorted((stride, size) for size, stride in zip(values.shape, values.stride(), strict=True) if size > 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return values.contiguous()
        expected *= size
    return values


def _pieces(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset, piece): on the CPU as large as its cache holds, on a GPU all at once."""
    flat = _flat(values)
    size = _CHUNK if values.device.type == "cpu" else max(1, flat.numel())
    for start in range(0, flat.numel(), size):
        yield start, flat[start : start + size]


def msb_histogram(values: Tensor, out: Tensor | None = None) -> Tensor:
    """How many values have their most significant non-sign bit at which position.

    For a float this is the position in its fixed-point form, floor(log2|x|), which its exponent field holds.

    Args:
        values: floats, any shape; taken as float32.
        out: int64, (256,): added to, if given.

    Returns:
        int64, (256,): bin e counts 2**(e-127) <= |x| < 2**(e-126); bin 0 zeros and subnormals; bin 255 NaN and Inf.
    """
    out = torch.zeros(BINS, dtype=torch.int64, device=values.device) if out is None else out
    for _, piece in _pieces(dense(values.detach().float())):
        _count(piece, out)
    return out


def _count(piece: Tensor, out: Tensor) -> None:
    # The sign ends up in bit 8, which the conversion to 8 bits drops.
    out += torch.bincount((piece.view(torch.int32) >> 23).to(torch.uint8), minlength=BINS)


def code_type(bits: int) -> torch.dtype:
    """The integers that hold codes of so many bits."""
    return torch.int8 if bits <= 8 else torch.int16


def exponent_of(position: int, bits: int) -> int:
    """Of the value of the lowest bit, when the highest one is at `position`."""
    return position - (bits - 2)


def encode(
    values: Tensor, bits: int, position: int, stochastic: bool = False, histogram: Tensor | None = None
) -> Tensor:
    """Round to fixed point; what does not fit saturates, symmetrically.

    Args:
        values: floats, any shape; taken as float32.
        bits: 2 to 16, the sign included.
        position: of the most significant bit that the format holds.
        stochastic: round up with the probability of what is cut off (from 16 random bits), so that the mean is right
            (Gupta et al., ICML 2015); else to the nearest, ties to even.
        histogram: as of `msb_histogram`, added to in the same pass. Without it, NaN and Inf raise.

    Returns:
        Codes: int8 up to 8 bits, int16 above, in the values' shape and memory order.

    Raises:
        LayerlabError: another number of bits.
        ValueError: NaN or Inf, where no histogram counts them.
    """
    if not 2 <= bits <= 16:
        raise LayerlabError(f"Fixed point has 2 to 16 bits here, got {bits}.")
    values = dense(values.detach().float())
    codes = torch.empty_like(values, dtype=code_type(bits))
    target = _flat(codes)
    inverse, most = 2.0 ** -exponent_of(position, bits), 2 ** (bits - 1) - 1
    total = torch.zeros((), device=values.device)
    for start, piece in _pieces(values):
        n = piece.numel()
        scaled = piece * inverse
        if histogram is not None:
            _count(piece, histogram)
        else:
            total += scaled.sum()
        if stochastic:
            noise = torch.empty((n + 3) // 4, dtype=torch.int64, device=piece.device).random_(-(2**63), None)
            # Uniform in (-1/2, 1/2), without a mean of its own.
            scaled.add_(noise.view(torch.int16)[:n], alpha=2.0**-16).add_(2.0**-17)
        target[start : start + n].copy_(scaled.round_().clamp_(-most, most))
    # A finite sum proves that all are; one that is not may also come from large finite values.
    if histogram is None and not total.isfinite() and not values.isfinite().all():
        raise ValueError("NaN or Inf")
    return codes


def decode(codes: Tensor, exponent: int) -> Tensor:
    """The values that codes stand for, float32: codes * 2**exponent."""
    return torch.mul(codes, 2.0**exponent)
