"""Convolutions and matrix products of integer codes, on int8 or fp8 units or emulated, with the same bits.

All give the exact integer sum, rounded once to float32 and scaled by a power of two. The emulation multiplies the codes
as floats: products and sums of integers are exact as long as no sum exceeds the float's integers, which is proved by a
bound beforehand; where the bound does not hold, the sum is made in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerlab import LayerlabWarning

Units = Literal["auto", "int8", "fp8", "emulated"]
_FLOAT32 = 2**24
"""All integers up to this one are float32 numbers."""
_INT32 = 2**31 - 1
PIECE = 2**21
"""Bytes of what a convolution's operands are turned into at a time (floats, or columns): images are taken in pieces, or
a batch's columns would be the largest thing in memory. The sums are exact, so that the bits stay the same."""


_ON_GPUS = {"int8": (7, 5), "fp8": (8, 9), "bfloat16": (8, 0)}
"""Compute capability from which NVIDIA's GPUs have units for a format."""
_ON_CPUS = {"int8": ("avx512_vnni", "avx_vnni", "amx_int8"), "fp8": (),
            "bfloat16": ("avx512_bf16", "amx_bf16", "bf16")}
"""Names of the instructions, of which any one will do, as `torch.cpu.get_capabilities` has them."""


def has_units(form: str, device: torch.device) -> bool:
    """Whether a device multiplies numbers of a format, `int8`, `fp8` or `bfloat16`, by instructions of its own.

    Example:
        >>> has_units("fp8", torch.device("cpu"))
        False
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _ON_GPUS[form]
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in _ON_CPUS[form])


def warn_without_units(form: str, device: torch.device, remedy: str) -> None:
    """Say that a format is emulated on a device, in one sentence with the remedy."""
    if not has_units(form, device):
        warnings.warn(f"This {device.type} has no instructions for {form}, which may make a step ten times slower than "
                      f"in float32; {remedy}.", LayerlabWarning, stacklevel=3)


def find_units(wanted: Units, device: torch.device) -> Units:
    """What `auto` means on a device: int8 on GPUs and CPUs that have such units, else emulated."""
    if wanted != "auto":
        return wanted
    return "int8" if has_units("int8", device) else "emulated"


@dataclass(frozen=True)
class Geometry:
    """Of a two-dimensional convolution.

    Attributes:
        stride, padding, dilation: (vertical, horizontal).
        groups: of channels.
        transposed: whether its forward is the input gradient of a convolution, as `nn.ConvTranspose2d` has it.
        added: (vertical, horizontal) places that a transposed one adds below and right.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    transposed: bool = False
    added: tuple[int, int] = (0, 0)

    def output_shape(self, x: Tensor, w: Tensor) -> torch.Size:
        """Of a transposed convolution of x, (batch, inputs, height, width), by w, (inputs, outputs / groups, …)."""
        sizes = [
            (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + added + 1
            for size, stride, pad, dilation, kernel, added in zip(
                x.shape[2:], self.stride, self.padding, self.dilation, w.shape[2:], self.added, strict=True)
        ]
        return torch.Size((len(x), w.shape[1] * self.groups, *sizes))


def matrix_product(a: Tensor, b: Tensor, units: Units) -> Tensor:
    """Codes (m, k) × codes (k, n), exact.

    Args:
        a, b: int8; for fp8, |code| <= 15, so that e4m3's four significant bits hold every code.
        units: `int8` by torch._int_mm, `fp8` by torch._scaled_mm.

    Returns:
        (m, n), int32; int64 where the sum over k may exceed int32.
    """
    m, k = a.shape
    most = 15 if units == "fp8" else 127
    longest = (_FLOAT32 if units == "fp8" else _INT32) // most**2
    if k > longest:
        parts = [matrix_product(a[:, i : i + longest], b[i : i + longest], units).long()
                 for i in range(0, k, longest)]
        return torch.stack(parts).sum(0)
    if units == "int8" and not a.is_cuda:
        # oneDNN takes any shape, and operands as they lie, transposed ones too.
        return torch._int_mm(a, b)
    n = b.shape[1]
    # The units take more than 16 rows and multiples of 16 columns.
    rows = max(32, m)
    a = functional.pad(a, (0, -k % 16, 0, rows - m))
    b = functional.pad(b, (0, -n % 16, 0, -k % 16))
    if units == "int8":
        # cuBLAS has integer products for a second operand column by column alone ("TN").
        return torch._int_mm(a.contiguous(), b.t().contiguous().t())[:m, :n]
    one = torch.ones((), device=a.device)
    eighths = torch.float8_e4m3fn
    # _scaled_mm wants the second operand column by column.
    return torch._scaled_mm(
        a.to(eighths).contiguous(), b.t().to(eighths).contiguous().t(), scale_a=one, scale_b=one,
        out_dtype=torch.float32, use_fast_accum=False,
    )[:m, :n].to(torch.int32)


class Product:
    """A layer's three products on codes of one shape: forward, input gradient, weight gradient.

    Args:
        geometry: of a convolution; None for a linear layer, whose codes are matrices.
        units: where they run.
        exact: integer sums. Else one product of floats, whose sums round beyond 24 bits.
    """

    def __init__(self, geometry: Geometry | None, units: Units, exact: bool) -> None:
        self.geometry, self.exact = geometry, exact
        self.units = units if exact else "emulated"

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """y of x, (batch, …), and w, (outputs, …), as codes; float32, in units of the codes' product."""
        if self._transposed:
            assert self.geometry is not None
            return self._plain.input_gradient(x, w, self.geometry.output_shape(x, w))
        if self.geometry is None:
            if self._on_units(x, w):
                return _floats(matrix_product(x, w.t(), self.units))
            kind = self._float(lambda: _largest(x) * _norms(w, 1, slice(1, None)).max())
            return (x.to(kind) @ w.to(kind).t()).float()
        if self._on_units(x, w):
            return self._by_pieces(*self._forward_on_units(x, w), x)
        kind = self._float(lambda: _largest(x) * _norms(w, 1, slice(1, None)).max())
        g, weight = self.geometry, w.to(kind)
        with _full_float32(x):
            return self._by_pieces(lambda part: functional.conv2d(
                part.to(kind), weight, None, g.stride, g.padding, g.dilation, g.groups), 2 * x[0].numel(), x)

    def input_gradient(self, dy: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """dX of that shape, of dY and w."""
        if self._transposed:
            return self._plain.forward(dy, w)
        if self.geometry is None and self._on_units(dy, w):
            return _floats(matrix_product(dy, w, self.units))
        g = self.geometry
        if g is not None and self._on_units(dy, w):
            return self._by_pieces(*self._input_gradient_on_units(dy, w, shape), dy)
        # Each dX sums over outputs and kernel places.
        kind = self._float(lambda: _largest(dy) * _norms(w, 1, 0).sum(tuple(range(1, w.dim() - 1))).max())
        weight = w.to(kind)
        if self.geometry is None:
            return (dy.to(kind) @ weight).float()
        image = weight.new_empty(()).expand(1, *shape[1:])
        return self._by_pieces(lambda part: self._convolution_backward(
            part.to(kind), image.expand(len(part), *shape[1:]), weight, True), 4 * dy[0].numel(), dy)

    def weight_gradient(self, dy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """dW of that shape, of dY and x."""
        if self._transposed:
            return self._plain.weight_gradient(x, dy, shape)
        if self.geometry is None and self._on_units(dy, x):
            return _floats(matrix_product(dy.t(), x, self.units))
        if self._on_units(dy, x):
            return self._weight_gradient_on_units(dy, x, shape)
        if not self.exact:
            return self._weight_gradient(dy, x, shape, torch.float32)
        # Cauchy and Schwarz: |Σ dy·x| <= ‖dy‖·‖x‖, channel by channel; images are taken together as long as that holds.
        dims = slice(2, None)
        of_dy, of_x = (torch.cat([_norms(piece, 2, dims) for piece in _pieces(part)]).cumsum(0) for part in (dy, x))
        most = len(dy) if self.geometry is None else max(1, PIECE // (4 * (x[0].numel() + dy[0].numel())))
        together = torch.sqrt(of_dy[-1].amax() * of_x[-1].amax()) <= _FLOAT32
        total: Tensor | None = None
        start = 0
        while start < len(dy):
            bound = torch.sqrt(_after(of_dy, start) * _after(of_x, start))
            count = int((bound <= _FLOAT32).sum())
            kind = torch.float32 if count else torch.float64
            end = start + max(1, min(count, most))
            part = self._weight_gradient(dy[start:end], x[start:end], shape, kind)
            if total is None:
                total = part if together or end == len(dy) else part.double()
            else:
                total.add_(part)
            start = end
        assert total is not None
        return total.float()

    def _weight_gradient(self, dy: Tensor, x: Tensor, shape: torch.Size, kind: torch.dtype) -> Tensor:
        dy, x = dy.to(kind), x.to(kind)
        if self.geometry is None:
            return dy.t() @ x
        return self._convolution_backward(dy, x, x.new_empty(()).expand(shape), False)

    def _convolution_backward(self, dy: Tensor, x: Tensor, w: Tensor, of_input: bool) -> Tensor:
        g = self.geometry
        assert g is not None
        wanted = (of_input, not of_input, False)
        with _full_float32(dy):
            gradients = torch.ops.aten.convolution_backward(
                dy, x, w, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, wanted
            )
        return gradients[0 if of_input else 1]

    def _float(self, bound: Callable[[], Any]) -> torch.dtype:
        return torch.float32 if not self.exact or bound() <= _FLOAT32 else torch.float64

    def _on_units(self, *codes: Tensor) -> bool:
        if self.units == "emulated" or any(part.dtype != torch.int8 for part in codes):
            return False
        # On a CPU, floats multiply all groups at once; on units each is a small product of its own.
        return self.geometry is None or self.geometry.groups == 1 or codes[0].is_cuda

    @property
    def _transposed(self) -> bool:
        return self.geometry is not None and self.geometry.transposed

    @property
    def _plain(self) -> Product:
        """The convolution that a transposed one is the input gradient of: with the two activations exchanged."""
        assert self.geometry is not None
        return Product(replace(self.geometry, transposed=False), self.units, self.exact)

    # ------------------------------------------------------------------------ as matrix products (im2col)

    def _by_pieces(self, product: Callable[[Tensor], Tensor], bytes_an_image: int, x: Tensor) -> Tensor:
        """A product whose images do not depend on each other, (batch, …), float32."""
        count = max(1, PIECE // max(1, bytes_an_image))
        first = product(x[:count])
        order = memory_order(x)
        if count >= len(x) and first.dtype == torch.float32 and first.is_contiguous(memory_format=order):
            return first
        # Written where it belongs at once: joining the pieces would hold all of them twice.
        result = torch.empty((len(x), *first.shape[1:]), device=x.device, memory_format=order)
        result[:count] = first
        del first
        for start in range(count, len(x), count):
            result[start : start + count] = product(x[start : start + count])
        return result

    def _forward_on_units(self, x: Tensor, w: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
        """(the product of some images with w, bytes of an image's columns and sums)."""
        g = self.geometry
        assert g is not None
        cut = self._cut_of(x, w.shape)

        def product(part: Tensor) -> Tensor:
            return _joined([cut.product(rows, images, self.units) for images, rows in zip(
                part.chunk(g.groups, 1), w.chunk(g.groups), strict=True)], 1)

        return product, cut.bytes(w[0].numel(), len(w))

    def _input_gradient_on_units(
        self, dy: Tensor, w: Tensor, shape: torch.Size
    ) -> tuple[Callable[[Tensor], Tensor], int]:
        """The same of dX: a convolution of dY, with zeros where the stride left places out, by the mirrored kernel."""
        g = self.geometry
        assert g is not None
        spread = [d * (k - 1) for d, k in zip(g.dilation, w.shape[2:], strict=True)]
        start = spread[0] - g.padding[0], spread[1] - g.padding[1]
        size = shape[2] + spread[0], shape[3] + spread[1]
        kernel = w.shape[2], w.shape[3]
        cut = _Cut(kernel, (shape[2], shape[3]), (1, 1), g.dilation, size, start, g.stride,
                   dy.is_cuda or _as_pixels(dy.shape[1] // g.groups, kernel, shape[3], 1))
        # (inputs / groups, outputs / groups, …) of each group.
        mirrored = [rows.flip(2, 3).transpose(0, 1) for rows in w.chunk(g.groups)]

        def product(part: Tensor) -> Tensor:
            return _joined([cut.product(rows, images, self.units) for images, rows in zip(
                part.chunk(g.groups, 1), mirrored, strict=True)], 1)

        return product, cut.bytes(mirrored[0][0].numel(), shape[1])

    def _weight_gradient_on_units(self, dy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        g, cut = self.geometry, self._cut_of(x, shape)
        assert g is not None
        places = dy[0, 0].numel()
        count = max(1, PIECE // cut.bytes(shape[1:].numel(), 0))
        # Of all images together; a piece by itself may fit 32 bits where the sum does not.
        kind = torch.int32 if 127**2 * len(x) * places <= _INT32 else torch.int64
        total: Tensor | None = None
        for start in range(0, len(x), count):
            of_dy, of_x = dy[start : start + count], x[start : start + count]
            parts = [matrix_product(rows.transpose(0, 1).flatten(1), cut.columns(images).t(), self.units)
                     for rows, images in zip(of_dy.chunk(g.groups, 1), of_x.chunk(g.groups, 1), strict=True)]
            piece = _joined(parts, 0)
            total = piece.to(kind) if total is None else total.add_(piece)
        assert total is not None
        return cut.kernels(total.float(), shape)

    def _cut_of(self, x: Tensor, shape: torch.Size) -> _Cut:
        """How x is cut into columns for kernels of that shape, (outputs, inputs / groups, vertical, horizontal)."""
        g = self.geometry
        assert g is not None
        size = x.shape[2] + 2 * g.padding[0], x.shape[3] + 2 * g.padding[1]
        kernel = shape[2], shape[3]
        height, width = (
            (whole - dilation * (of_kernel - 1) - 1) // stride + 1
            for whole, dilation, of_kernel, stride in zip(size, g.dilation, kernel, g.stride, strict=True))
        return _Cut(kernel, (height, width), g.stride, g.dilation, size, g.padding, (1, 1),
                    x.is_cuda or _as_pixels(shape[1], kernel, width, g.stride[1]))


def _as_pixels(channels: int, kernel: tuple[int, int], width: int, stride: int) -> bool:
    """Whether a CPU makes columns faster pixel by pixel, which copies the bytes of a kernel's row at a time, than
    channel by channel, which copies an output's row at a time, if its stride is 1."""
    return stride > 1 or kernel[1] * channels >= 2 * width


@dataclass(frozen=True)
class _Cut:
    """How images are cut into columns, one for each place of an output (im2col), of codes.

    Attributes:
        kernel, places, stride, dilation: (vertical, horizontal), of the product.
        size: of the frame of zeros in which an image lies.
        start: place of an image's first pixel in the frame; below 0, the first ones lie outside.
        step: from one pixel of an image to the next one in the frame.
        pixels: whether a column is (vertical, horizontal, channels) rather than (channels, vertical, horizontal).
    """

    kernel: tuple[int, int]
    places: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    start: tuple[int, int]
    step: tuple[int, int]
    pixels: bool

    def bytes(self, terms: int, outputs: int) -> int:
        """Of an image's columns of so many terms, and of so many outputs in 32-bit integers."""
        return math.prod(self.places) * (terms + 4 * outputs)

    def columns(self, x: Tensor) -> Tensor:
        """(terms, images × places) of x, (images, channels, vertical, horizontal)."""
        count, channels = x.shape[:2]
        order = torch.channels_last if self.pixels else torch.contiguous_format
        frame = torch.empty((count, channels, *self.size), dtype=x.dtype, device=x.device, memory_format=order).zero_()
        inside, taken = zip(*map(_overlap, x.shape[2:], self.size, self.start, self.step), strict=True)
        frame[:, :, *inside] = x[:, :, *taken]
        of_image, of_channel, *of_place = frame.stride()
        places = [place * stride for place, stride in zip(of_place, self.stride, strict=True)]
        kernel = [place * dilation for place, dilation in zip(of_place, self.dilation, strict=True)]
        if self.pixels:
            shape = (count, *self.places, *self.kernel, channels)
            return frame.as_strided(shape, (of_image, *places, *kernel, of_channel)).reshape(
                count * math.prod(self.places), -1).t()
        shape = (channels, *self.kernel, count, *self.places)
        return frame.as_strided(shape, (of_channel, *kernel, of_image, *places)).reshape(
            channels * math.prod(self.kernel), -1)

    def product(self, kernels: Tensor, x: Tensor, units: Units) -> Tensor:
        """(images, outputs, vertical, horizontal) of x and kernels, (outputs, channels, vertical, horizontal)."""
        rows, columns = (kernels.permute(0, 2, 3, 1) if self.pixels else kernels).flatten(1), self.columns(x)
        # A GPU's units want the columns' terms next to each other; a CPU's take them either way.
        if x.is_cuda or memory_order(x) is torch.channels_last:
            sums = matrix_product(columns.t(), rows.t(), units).t()
        else:
            sums = matrix_product(rows, columns, units)
        return sums.unflatten(1, (len(x), *self.places)).transpose(0, 1)

    def kernels(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Kernels of that shape of rows, (outputs, terms)."""
        if not self.pixels:
            return rows.view(shape)
        return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()


def _overlap(count: int, size: int, start: int, step: int) -> tuple[slice, slice]:
    """(places in a frame of that size, pixels of so many that lie there), a pixel at every `step` from `start` on."""
    first = max(0, -(start // step))
    last = min(count, -((start - size) // step))
    return slice(start + first * step, max(0, start + (last - 1) * step + 1), step), slice(first, max(first, last))


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """What the groups gave, side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _floats(sums: Tensor) -> Tensor:
    """Integer sums as float32, on a CPU in the memory of 32-bit ones: fresh memory costs more than the conversion."""
    if sums.is_cuda or sums.dtype != torch.int32 or not sums.is_contiguous():
        return sums.float()
    return sums.view(torch.float32).copy_(sums)


def memory_order(operand: Tensor) -> torch.memory_format:
    """The memory order that a convolution gives for an operand."""
    last = operand.is_contiguous(memory_format=torch.channels_last) and not operand.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _pieces(codes: Tensor) -> Iterator[Tensor]:
    """Codes image by image, or as many at once as are not more than `PIECE` bytes as floats."""
    yield from codes.split(max(1, PIECE // max(1, 4 * codes[0].numel())))


def _full_float32(operand: Tensor) -> AbstractContextManager[Any]:
    """Keep cuDNN from TensorFloat-32, whose 11 bits do not hold 16-bit codes."""
    if not operand.is_cuda:
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


def _largest(codes: Tensor) -> int:
    """What no code exceeds, from their type: a bound that needs no pass."""
    return 2 ** (8 * codes.element_size() - 1)


def _norms(codes: Tensor, power: int, dims: slice | int) -> Tensor:
    """Σ|c| or Σc² over dimensions, float64."""
    values = codes.float()
    values = values.abs() if power == 1 else values.square_()
    if isinstance(dims, int):
        return values.sum(dims, dtype=torch.float64)
    over = tuple(range(codes.dim())[dims])
    return values.sum(over, dtype=torch.float64) if over else values.double()


def _after(cumulative: Tensor, start: int) -> Tensor:
    """The largest channel's sum of squares of the images from `start` on: (images - start,)."""
    before = cumulative[start - 1] if start else 0
    return (cumulative[start:] - before).amax(1)
