"""Fixed point with one power-of-two scale a tensor: histogram of most significant bits, encoding, decoding.

A tensor of b bits is integers c with |c| < 2**(b-1), which stand for c * 2**exponent. The *position* p is that of the
most significant bit that the format still holds: exponent = p - (b - 2), so that every |x| < 2**(p+1) fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from layerlab import LayerlabError

BINS = 256
BIAS = 127
"""Bin e of a histogram counts values whose most significant bit is at position e - BIAS."""
NOT_FINITE = BINS - 1
LOWEST = -100
"""No position below this: scales stay normal float32 numbers at all widths."""
_CHUNK = 2**17
"""Elements of a piece on the CPU: its few passes then stay in the cache."""
_MANY = 2**13
"""Elements from which a piece is counted by exponent and leading mantissa bits."""
_SPREAD = 2
"""Of these bits: values of one exponent then add to several counters, and need not wait for each other."""
_DRAWN = 2**13
"""Random numbers that are drawn for a tensor."""
_ODD = 0x0001_0001_0001_0001
"""The lowest bit of each 16 bits."""


def _flat(values: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    if values.is_contiguous():
        return values.view(-1)
    return values.as_strided((values.numel(),), (1,), values.storage_offset())


def dense(values: Tensor) -> Tensor:
    """The tensor itself if its elements fill one piece of memory, in whatever order of dimensions; else a copy."""
    if values.is_contiguous():
        return values
    strides = sorted((stride, size) for size, stride in zip(values.shape, values.stride(), strict=True) if size > 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return values.contiguous()
        expected *= size
    return values


def _size(values: Tensor) -> int:
    """Elements of a piece: on the CPU as many as its cache holds, on a GPU all at once."""
    return min(values.numel(), _CHUNK) if values.device.type == "cpu" else values.numel()


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
    flat = _flat(dense(values.detach().float()))
    if size := _size(flat):
        scratch = torch.empty(size, device=flat.device)
        for piece in _split(flat, size):
            _count(piece, scratch[: piece.numel()], out)
    return out


def _count(piece: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Add a piece's histogram; the scratch is as large as the piece, and overwritten."""
    spread = _SPREAD if piece.numel() >= _MANY else 0
    # Without its sign, a float's bits are its exponent and, behind it, its mantissa.
    torch.abs(piece, out=scratch)
    fields = scratch.view(torch.int32).bitwise_right_shift_(23 - spread)
    counts = torch.bincount(fields, minlength=BINS << spread)
    out += counts.view(BINS, -1).sum(1) if spread else counts


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
        stochastic: round up with the probability of what is cut off (from 15 random bits), so that the mean is right
            (Gupta et al., ICML 2015); else to the nearest, ties to even.
        histogram: as of `msb_histogram`, added to in the same pass. Without it, NaN and Inf raise.

    Returns:
        Codes: int8 up to 8 bits, int16 above, in the values' shape and memory order.

    Raises:
        LayerlabError: another number of bits.
        ValueError: NaN or Inf, where no histogram counts them.
    """
    values = dense(values.detach().float())
    codes = torch.empty_like(values, dtype=code_type(bits))
    _round(_flat(values), _flat(codes), bits, position, stochastic, histogram)
    return codes


def round_to(
    values: Tensor, bits: int, position: int, stochastic: bool = False, histogram: Tensor | None = None
) -> int:
    """Round floats in place to numbers of a format: `encode` and `decode` in one pass, without the codes.

    Args:
        values: floats, any shape; overwritten.
        bits, position, stochastic, histogram: as of `encode`.

    Returns:
        Bytes that the codes would have taken.

    Raises:
        LayerlabError, ValueError: as `encode`.

    Example:
        >>> values = torch.tensor([0.3, -1.2, 9.0])
        >>> round_to(values, bits=3, position=0), values
        (3, tensor([ 0.5000, -1.0000,  1.5000]))
    """
    values = values.detach()
    whole = dense(values.float())
    flat = _flat(whole)
    _round(flat, flat, bits, position, stochastic, histogram)
    if whole is not values:
        values.copy_(whole)
    return values.numel() * code_type(bits).itemsize


def _round(
    flat: Tensor, codes: Tensor, bits: int, position: int, stochastic: bool, histogram: Tensor | None
) -> None:
    """Round (n,) float32 to codes, (n,) integers; to the values themselves where these are given as the codes."""
    if not 2 <= bits <= 16:
        raise LayerlabError(f"Fixed point has 2 to 16 bits here, got {bits}.")
    exponent, most = exponent_of(position, bits), 2 ** (bits - 1) - 1
    size = _size(flat)
    if size == 0:
        return
    # One scratch for all pieces: fresh memory costs the system more than the passes over it.
    scratch = torch.empty(size, device=flat.device)
    noise = _Noise(flat.numel(), size, flat.device) if stochastic else None
    for number, (piece, target) in enumerate(zip(_split(flat, size), _split(codes, size), strict=True)):
        scaled = scratch if piece.numel() == size else scratch[: piece.numel()]
        if histogram is not None:
            _count(piece, scaled, histogram)
        torch.mul(piece, 2.0**-exponent, out=scaled)
        # A finite sum proves that all are; one that is not may also come from large finite values.
        if histogram is None and not scaled.sum().isfinite() and not piece.isfinite().all():
            raise ValueError("NaN or Inf")
        if noise is not None:
            scaled.add_(noise.of(number)[: piece.numel()], alpha=2.0**-16)
        scaled.round_().clamp_(-most, most)
        if codes is flat:
            torch.mul(scaled, 2.0**exponent, out=target)
        else:
            target.copy_(scaled)


def _split(flat: Tensor, size: int) -> Sequence[Tensor]:
    return (flat,) if flat.numel() == size else flat.split(size)


class _Noise:
    """Random odd 16-bit integers, uniform and without a mean of their own, for all pieces of a tensor.

    Only a block of `_DRAWN` is drawn. Each further block is the first one with some bits turned over, the same ones
    throughout the block and drawn for it: any two numbers are still independent of each other, which is all that mean
    and variance of a sum ask for.

    Args:
        count: elements of the tensor.
        size: of a piece; a multiple of `_DRAWN` where there are several.
        device: where they are.
    """

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        # Four of 16 bits in each of 64.
        words, self._blocks = -(-min(size, _DRAWN) // 4), -(-size // _DRAWN)
        others = -(-count // _DRAWN) - 1
        drawn = torch.empty(words + others, dtype=torch.int64, device=device).random_(-(2**63), None)
        self._first = drawn
        self._turned: Tensor | None = None
        if others:
            self._first = drawn[:words]
            # (blocks, 1): the first block is as it was drawn.
            self._turned = functional.pad(drawn[words:].bitwise_and_(~_ODD), (1, 0))[:, None]
        self._first.bitwise_or_(_ODD)

    def of(self, piece: int) -> Tensor:
        """int16, as many as a piece has elements or more."""
        if self._turned is None:
            return self._first.view(torch.int16)
        part = self._turned[piece * self._blocks : (piece + 1) * self._blocks]
        return (self._first ^ part).view(-1).view(torch.int16)


def decode(codes: Tensor, exponent: int) -> Tensor:
    """The values that codes stand for, float32: codes * 2**exponent."""
    return codes.float().mul_(2.0**exponent)
