"""Convolutions and batch norms some channels at a time, and gradients over what nothing reads any more.

oneDNN copies a convolution's operands and its result into layouts of its own, and PyTorch's backward of a batch norm
allocates its result twice. Channels are split only where no sum runs over them: each element is added up as in the
whole. Only plain layouts and whole blocks of channels are split, for which `tests/test_parts.py` finds the same bits.
The input gradient of a batch norm takes over its operand's memory, and that of a ReLU its result's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from layerlab_memory_reorder.method.keeping import taken

# Bytes that are worked on at a time. Smaller parts save less than they take time.
PART = 2**21
# Channels that oneDNN keeps together; a part is a multiple of it.
BLOCK = 16


def channel_parts(channels: int, size: int, most: int = PART) -> list[slice]:
    """Channels in parts of about `most` bytes.

    Args:
        channels: how many there are.
        size: bytes of all of them together.
        most: bytes of a part, if it has more than one block.

    Example:
        >>> channel_parts(64, 2 * PART)
        [slice(0, 32, None), slice(32, 64, None)]
    """
    count = min(-(-size // most), channels // BLOCK)
    if channels % BLOCK or count < 2:
        return [slice(0, channels)]
    step = BLOCK * -(-channels // (BLOCK * count))
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def splits(module: Any, *tensors: Tensor) -> bool:
    """Whether a layer on these tensors may be computed by parts of its channels: a convolution of all or of each."""
    depthwise = type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels
    return type(module) is nn.Conv2d and (module.groups == 1 or depthwise) and all(
        each.is_contiguous() and each.dtype == torch.float32 for each in tensors)


def input_gradient(
    whole: Callable[[Tensor, Tensor, torch.Size], Tensor], dy: Tensor, weight: Tensor, shape: torch.Size
) -> Tensor:
    """dX of a convolution that `splits`, some of its channels at a time.

    Args:
        whole: dX from dY, weights and dX's shape.
        dy: (batch, out, rows, columns).
        weight: (out, in, …).
        shape: of dX, (batch, in, rows, columns).
    """
    images, channels, *pixels = shape
    size = dy.element_size() * shape.numel()
    parts = channel_parts(channels, max(size, weight.nbytes))
    # oneDNN's copies: of the larger gradient (of both where it makes room for a stride) and the weights. In parts: of
    # all of dY, and of a part of dX and of the weights, beside that part as it is.
    strided = shape[2:].numel() > dy.shape[2:].numel()
    copied = (2 * size if strided else max(size, dy.nbytes)) + weight.nbytes
    if len(parts) == 1 or dy.nbytes + 2 * (size + weight.nbytes) // len(parts) >= copied:
        return whole(dy, weight, shape)
    dx = dy.new_empty(shape)
    depthwise = weight.shape[1] != channels
    for part in parts:
        few = weight[part] if depthwise else weight[:, part].contiguous()
        its_shape = torch.Size((images, part.stop - part.start, *pixels))
        dx[:, part] = whole(dy[:, part].contiguous() if depthwise else dy, few, its_shape)
    return dx


def weight_gradient(whole: Callable[[Tensor, Tensor, Tensor], Tensor], dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dW of a convolution that `splits`, for some channels of the larger operand at a time.

    Args:
        whole: dW from dY, X and the weights.
        dy: (batch, out, rows, columns).
        x: (batch, in, rows, columns).
        weight: (out, in, …).
    """
    along_out = dy.nbytes >= x.nbytes
    larger = dy if along_out else x
    parts = channel_parts(larger.shape[1], larger.nbytes)
    # Each part is there twice, as it is and in oneDNN's layout.
    if len(parts) < 3:
        return whole(dy, x, weight)
    dw = torch.empty_like(weight)
    depthwise = weight.shape[1] != x.shape[1]
    for part in parts:
        if depthwise:
            dw[part] = whole(dy[:, part], x[:, part], weight[part])
        elif along_out:
            dw[part] = whole(dy[:, part], x, weight[part])
        else:
            dw[:, part] = whole(dy, x[:, part], weight[:, part])
    return dw


class _BatchNorm(Function):
    """Batch norm by the batch whose input gradient takes over its operand's memory, some channels at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: nn.BatchNorm2d) -> Tensor:
        tracked = module.track_running_stats
        if tracked and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        assert module.momentum is not None
        y, mean, deviation = torch.native_batch_norm(
            x, weight, bias, module.running_mean if tracked else None, module.running_var if tracked else None, True,
            module.momentum, module.eps)
        # Not saved through autograd, which would hold the operand beside its gradient.
        ctx.x, ctx.version, ctx.kept, ctx.eps = x.detach(), x._version, True, module.eps
        ctx.save_for_backward(weight, mean, deviation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, deviation = ctx.saved_tensors
        x = taken(ctx)
        if not dy.is_contiguous():
            # PyTorch goes through such a gradient in another order.
            return (*torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, None, None, mean, deviation, True, ctx.eps, [True, True, True]), None)
        dx = x if sole_owner(x) else torch.empty_like(x)
        scales, shifts = torch.empty_like(weight), torch.empty_like(weight)
        # A part stands for four: of the operand, of the result's gradient, and of the input gradient, twice.
        for part in channel_parts(x.shape[1], x.nbytes, PART // 2):
            dx[:, part], scales[part], shifts[part] = torch.ops.aten.native_batch_norm_backward(
                dy[:, part].contiguous(), x[:, part].contiguous(), weight[part], None, None, mean[part],
                deviation[part], True, ctx.eps, [True, True, True])
        return dx, scales, shifts, None


def batch_norm_forward(module: Any) -> Callable[..., Tensor]:
    """A forward of a batch norm whose input gradient takes over its operand's memory."""
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        # PyTorch's backward takes twice the operand's bytes; this one those of four parts.
        few = x.dim() != 4 or len(channel_parts(x.shape[1], x.nbytes, PART // 2)) < 3
        # For single pixels there is no telling the layouts apart.
        if few or x.shape[2:].numel() == 1 or x.dtype != torch.float32 or not x.is_contiguous():
            return original(x)
        if not torch.is_grad_enabled():
            return original(x)
        return _BatchNorm.apply(x, module.weight, module.bias, module)

    return forward


class _Relu(Function):
    """ReLU whose input gradient takes over its result's memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        # Autograd counts what was marked as one change more, once this function is done.
        ctx.x, ctx.version, ctx.kept = y.detach(), y._version + int(inplace), True
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y = taken(ctx)
        if dy.stride() != y.stride() or not sole_owner(y):
            return torch.ops.aten.threshold_backward(dy, y, 0), None
        # Element by element, so that what is written may stand for what is read.
        torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=y)
        return y, None


def relu_forward(module: Any) -> Callable[..., Tensor]:
    """A forward of a ReLU whose input gradient takes over its result's memory."""
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if x.nbytes <= PART // 2 or x.grad_fn is None or x._is_view() or not torch.is_grad_enabled():
            return original(x)
        return _Relu.apply(x, module.inplace)

    return forward


def normalises(module: Any) -> bool:
    """Whether a module is a batch norm that `batch_norm_forward` can take over."""
    return (type(module) is nn.BatchNorm2d and module.affine and module.momentum is not None
            and module.weight.dtype == torch.float32)


def sole_owner(x: Tensor) -> bool:
    """Whether nothing but this tensor holds its memory, so that it may be written over; never where torch, which has no
    public way to tell, has lost its private one."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = x.untyped_storage()
    # This tensor's own and the one of the line above.
    return count is not None and count(storage._cdata) == 2
