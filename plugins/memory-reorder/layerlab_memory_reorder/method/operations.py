"""The operations that keep less for backward, and take their weights' gradients in slabs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layerlab_memory_reorder.method import parts
from layerlab_memory_reorder.method.keeping import gone, taken

if TYPE_CHECKING:
    from layerlab_memory_reorder.method.executor import Takeover

# Below this, the input gradient is computed by the very call that PyTorch's backward makes; see _input_gradient.
SMALL = 2**20
# Elements of a max pooling's result that are worked on at a time: its winners come as 8 bytes each.
CHUNK = 2**21


@dataclass(eq=False)
class Layer:
    """What a convolution's or linear layer's functions need to know.

    Attributes:
        module: the layer.
        takeover: its owner.
        masks: whether this layer's input comes from a ReLU that leaves its own backward to this one.
        results: of this layer's calls in a stretch that is computed again, see `kept_through_replays`.
    """

    module: Any
    takeover: Takeover
    masks: bool = False
    results: Results | None = None

    def by_channels(self, *tensors: Tensor) -> bool:
        """Whether this layer on these tensors is computed some channels at a time."""
        schedule = self.takeover.schedule
        return schedule is not None and schedule.by_channels and parts.splits(self.module, *tensors)

    def slab(self, dy: Tensor, x: Tensor | None, weight: Tensor, has_bias: bool) -> int:
        """Bytes of the weight gradient that exist at a time where it goes last; 0: all of it."""
        if isinstance(self.module, nn.Linear):
            return self.takeover.slab
        whole_blocks = self.module.groups == 1 and weight.shape[0] % parts.BLOCK == 0
        if x is None or has_bias or not whole_blocks or not self.by_channels(dy, x, weight):
            return 0
        return min(self.takeover.slab, parts.PART)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result, (batch, …), from a kept one where this is a computing again."""
        given = self.results.taken() if self.results is not None and self.results.replaying else None
        if given is not None:
            return given
        linear = isinstance(self.module, nn.Linear)
        result = F.linear(x, weight, bias) if linear else self.module._conv_forward(x, weight, bias)
        if self.results is not None and not self.results.replaying:
            self.results.put(result)
        return result


class Results:
    """A layer's results of one forward pass, in the order of its calls, for when these are computed again."""

    def __init__(self) -> None:
        self._kept: list[Tensor | None] = []
        self._versions: list[int] = []
        self.replaying = False

    def put(self, result: Tensor) -> None:
        """Keep the result of the next call."""
        self._kept.append(result.detach())
        self._versions.append(result._version)

    def settle(self) -> None:
        """Let go what was written over since, by a ReLU in place, say: it is computed again."""
        self._kept = [each if each is not None and each._version == version else None
                      for each, version in zip(self._kept, self._versions, strict=True)]
        self.replaying = True

    def taken(self) -> Tensor | None:
        """The next call's result, which is kept no longer; None where it is to be computed."""
        return self._kept.pop(0) if self._kept else None


@contextmanager
def kept_through_replays(layers: Sequence[Layer], results: list[Results] | None = None) -> Iterator[list[Results]]:
    """Keep the results of some layers of a stretch, or give them what was kept, while the stretch is computed.

    Args:
        layers: of the stretch.
        results: what an earlier block yielded, one for each layer, when the stretch is computed again.
    """
    replayed = results is not None
    results = [Results() for _ in layers] if results is None else results
    for layer, each in zip(layers, results, strict=True):
        layer.results = each
    try:
        yield results
    finally:
        for layer, each in zip(layers, results, strict=True):
            layer.results = None
            if not replayed:
                each.settle()


class _Parametric(Function):
    """Convolution or linear: dW and dX in the planned order, the input let go as soon as nothing reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        ctx.layer = layer
        ctx.shape, ctx.options = x.shape, {"dtype": x.dtype}
        ctx.has_bias = bias is not None
        masks = layer.masks and ctx.needs_input_grad[0]
        # Not saved through autograd, which would hold the input until this whole function has run.
        ctx.x = x.detach() if ctx.needs_input_grad[1] or masks else None
        ctx.version = x._version
        ctx.kept = ctx.x is not None
        ctx.save_for_backward(weight)
        return layer.compute(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        layer: Layer = ctx.layer
        x = taken(ctx)
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        linear = isinstance(layer.module, nn.Linear)
        dx = dw = db = None
        if linear and ctx.has_bias and needs_db:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        slab = layer.slab(dy, x, weight, ctx.has_bias)
        if slab and needs_dw and needs_dx and layer.takeover.goes_last(weight, x, slab):
            dx = torch.matmul(dy, weight) if linear else _input_gradient(layer, dy, weight, ctx.shape)
            if layer.masks:
                dx.masked_fill_(x <= 0, 0)
            layer.takeover.apply_slabs(weight, partial(_rows_gradient, layer.module, dy, x, weight), slab)
            return dx, None, db, None
        if slab and needs_dw and not needs_dx and layer.takeover.in_slabs(weight, slab):
            layer.takeover.apply_slabs(weight, partial(_rows_gradient, layer.module, dy, x, weight), slab)
            return None, None, db, None
        if needs_dw and linear:
            dw = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        elif not linear and (needs_dw or needs_db):
            dw, db = _weight_gradient(layer, dy, x, weight, needs_dw, ctx.has_bias and needs_db)
        mask = None
        if needs_dx and layer.masks:
            mask = x <= 0
        # The last reference here: unless someone else holds it, the input gradient takes over its memory.
        del x
        if needs_dx:
            dx = torch.matmul(dy, weight) if linear else _input_gradient(layer, dy, weight, ctx.shape)
            if mask is not None:
                dx.masked_fill_(mask, 0)
        return dx, dw, db, None


def _rows_gradient(module: Any, dy: Tensor, x: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Some rows of dW of a linear layer or a convolution."""
    if isinstance(module, nn.Linear):
        return dy.reshape(-1, dy.shape[-1])[:, rows].t() @ x.reshape(-1, x.shape[-1])
    return _convolution_gradients(module, dy[:, rows], x, weight[rows], [False, True, False])[1]


def _weight_gradient(
    layer: Layer, dy: Tensor, x: Tensor | None, weight: Tensor, needs_dw: bool, needs_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not needs_dw:
        return None, dy.sum((0, *range(2, dy.dim()))) if needs_db else None
    assert x is not None
    if not needs_db and layer.by_channels(dy, x, weight):
        def whole(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            return _convolution_gradients(layer.module, dy, x, weight, [False, True, False])[1]

        return parts.weight_gradient(whole, dy, x, weight), None
    _, dw, db = _convolution_gradients(layer.module, dy, x, weight, [False, True, needs_db])
    return dw, db if needs_db else None


def _convolution_gradients(module: Any, dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    """(dX, dW, db) of a convolution or of some of its channels, None where not wanted."""
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]] if wanted[2] else None, module.stride, module.padding, module.dilation, False,
        [0] * (weight.dim() - 2), x.shape[1] // weight.shape[1], wanted)


def _input_gradient(layer: Layer, dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """dX of a convolution, from dY and the weights alone."""
    whole = partial(_whole_input_gradient, layer.module)
    if layer.by_channels(dy, weight):
        return parts.input_gradient(whole, dy, weight, shape)
    return whole(dy, weight, shape)


def _whole_input_gradient(module: Any, dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    if math.prod(shape) * dy.element_size() <= SMALL:
        # convolution_backward makes a copy of the input for itself even when only dX is asked for and only the input's
        # shape counts: not worth avoiding here, and for small shapes PyTorch picks other algorithms.
        unread = dy.new_empty(1).expand(shape)
        return _convolution_gradients(module, dy, unread, weight, [True, False, False])[0]
    # The transposed convolution is the same computation without that copy.
    rest = [
        size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in zip(
            shape[2:], dy.shape[2:], module.stride, module.padding, module.dilation, weight.shape[2:], strict=True)
    ]
    return torch.ops.aten.convolution(
        dy, weight, None, module.stride, module.padding, module.dilation, True, rest,
        shape[1] // weight.shape[1])


class _SignLater(Function):
    """ReLU whose gradient is masked by whoever reads its result: needs to keep nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            return x.relu_()
        return x.relu()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _MaxPool(Function):
    """Max pooling that keeps each winner's distance from its window's first element, in 2 bytes (4 where images
    are thousands of pixels wide), and nothing else.

    PyTorch keeps the whole input and 8 bytes a winner. With `masks`, the gradient of a ReLU before it is computed
    along: a window whose largest value is 0 passes nothing on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...], masks: bool) -> Tensor:
        parts, codes = [], []
        base = None
        farthest = (settings[0][0] - 1) * x.shape[-1] + settings[0][1]
        dtype = torch.int16 if farthest < 2**15 else torch.int32
        for part in x.split(_images_at_once(x, settings)):
            y, winner = torch.ops.aten.max_pool2d_with_indices(part, *settings)
            if base is None:
                base = _first_elements(y, x, settings)
            winner.sub_(base)
            if masks:
                winner.masked_fill_(y <= 0, -1)
            codes.append(winner.to(dtype))
            parts.append(y)
        ctx.codes, ctx.base, ctx.settings, ctx.masks = codes, base, settings, masks
        ctx.shape, ctx.strides = x.shape, x.stride()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.codes is None:
            raise gone()
        codes, ctx.codes = ctx.codes, None
        dx = torch.empty_strided(ctx.shape, ctx.strides, dtype=dy.dtype, device=dy.device)
        at = 0
        for code in codes:
            part, given = dx[at: at + len(code)], dy[at: at + len(code)]
            at += len(code)
            winner = code.to(torch.int64)
            nothing = winner < 0 if ctx.masks else None
            winner.add_(ctx.base)
            if nothing is not None:
                given = given.masked_fill(nothing, 0)
                # Where a window passes nothing on, any place in the image does; PyTorch's kernel adds the 0 unchecked.
                winner.clamp_(min=0)
            # Only the input's shape counts here, so that what is written may stand for it.
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                given.contiguous(memory_format=_format(part)), part, *ctx.settings, winner, grad_input=part)
        return dx, None, None


class _ResponseNorm(Function):
    """Local response normalisation that keeps its operand and computes the rest again, some images at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.LocalResponseNorm) -> Tensor:
        ctx.module, ctx.x, ctx.version, ctx.kept = module, x.detach(), x._version, True
        y = torch.empty_like(x)
        for part, result in zip(_few(x), _few(y), strict=True):
            result.copy_(_response_norm(module, part))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x = taken(ctx)
        dx = torch.empty_like(x)
        for part, given, result in zip(_few(x), _few(dy), _few(dx), strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                again = _response_norm(ctx.module, part)
            result.copy_(torch.autograd.grad(again, part, given)[0])
        return dx, None


def _response_norm(module: nn.LocalResponseNorm, x: Tensor) -> Tensor:
    return F.local_response_norm(x, module.size, module.alpha, module.beta, module.k)


def _few(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, CHUNK * len(x) // max(1, x.numel())))


def _format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _images_at_once(x: Tensor, settings: tuple[Any, ...]) -> int:
    stride = settings[1]
    return max(1, CHUNK * stride[0] * stride[1] // max(1, math.prod(x.shape[1:])))


def _first_elements(y: Tensor, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """The index of each window's first element, (rows, columns), negative where it lies in the padding."""
    _, (down, right), (top, left), _, _ = settings
    rows = torch.arange(y.shape[2], device=x.device).mul_(down).sub_(top)
    columns = torch.arange(y.shape[3], device=x.device).mul_(right).sub_(left)
    return rows.unsqueeze(1) * x.shape[3] + columns


def pool_settings(module: nn.MaxPool2d) -> tuple[Any, ...] | None:
    """(kernel, stride, padding, dilation, ceil_mode) as pairs; None for a kind that is left to PyTorch."""
    def pair(value: Any) -> list[int]:
        return list(value) if isinstance(value, (tuple, list)) else [value, value]

    kernel, padding = pair(module.kernel_size), pair(module.padding)
    # A code must tell "nothing" from a distance, so that no distance may be negative.
    if module.return_indices or pair(module.dilation) != [1, 1]:
        return None
    return kernel, pair(module.stride), padding, [1, 1], module.ceil_mode


def plain_padding(module: Any) -> bool:
    """Whether a convolution pads with zeros by a number of pixels."""
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def parametric_forward(layer: Layer) -> Callable[..., Tensor]:
    """A forward of a convolution or linear layer whose weights' gradients come in slabs."""
    module = layer.module

    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if not x.is_floating_point() or (not isinstance(module, nn.Linear) and x.dim() != weight.dim()):
            return original(x)
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return _Parametric.apply(x, weight, bias, layer)
        # Cast outside the function, so that autograd casts the gradients back.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _Parametric.apply(x, weight, bias, layer)

    return forward


def relu_forward(module: Any, reader: nn.Module) -> Callable[..., Tensor]:
    """A forward of a ReLU that keeps one bit an element for backward."""
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not reader.training:
            # Someone set the reader alone to evaluation, where it keeps PyTorch's backward, which masks nothing.
            return original(x)
        # An operand that is a leaf or a view of one must not be written over inside a function.
        inplace = module.inplace and x.grad_fn is not None
        return _SignLater.apply(x, inplace)

    return forward


def pool_forward(module: nn.MaxPool2d, masks: bool) -> Callable[..., Tensor]:
    """A forward of a max pooling that keeps two bytes a result for backward."""
    settings = pool_settings(module)

    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if x.dim() == 3:
            return _MaxPool.apply(x.unsqueeze(0), settings, masks).squeeze(0)
        return _MaxPool.apply(x, settings, masks)

    return forward


def norm_forward(module: nn.LocalResponseNorm) -> Callable[..., Tensor]:
    """A forward of a local response normalisation that recomputes its scale in backward."""
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # Autocast picks another precision for each of its operations.
            return original(x)
        return _ResponseNorm.apply(x, module)

    return forward
