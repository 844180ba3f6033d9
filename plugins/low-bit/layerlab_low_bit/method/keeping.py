"""What backward needs, kept in few bits: activation, normalisation and pooling that decode no more than they must.

PyTorch's own functions would be given what they saved as whole tensors of floats again, each as large as the layer's
output: a ReLU needs signs alone, a pooling the places of its winners and no input, a batch norm one channel at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerlab_low_bit.method.fixedpoint import decode
from layerlab_low_bit.method.products import PIECE, memory_order

Keep = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Encoded:
    """Codes and the value of their lowest bit, 2**exponent."""

    codes: Tensor
    exponent: int

    @property
    def values(self) -> Tensor:
        """As float32."""
        return decode(self.codes, self.exponent)


@dataclass(frozen=True)
class Places:
    """Where a pooling found its largest values, in the smallest integers that hold them."""

    indices: Tensor


def unpack(kept: Any) -> Tensor:
    """The tensor that was kept, float32 or int64."""
    if isinstance(kept, Encoded):
        return kept.values
    return kept.indices.long() if isinstance(kept, Places) else kept


def taken(ctx: Any) -> Any:
    """What a function kept, which is let go: a graph holds its functions until the whole step is over."""
    if ctx.kept is None:
        raise RuntimeError("low-bit frees what backward reads as it goes; do not go backward through a graph twice.")
    kept, ctx.kept = ctx.kept, None
    return kept


class ReLU(torch.autograd.Function):
    """`relu(x)` of a tensor that is its own, or in place; its result's codes say where it passes a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, keep: Keep) -> Tensor:
        """(…) → (…)."""
        y = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.kept = keep(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """dX: the gradient where the result was above zero."""
        kept = taken(ctx)
        if not isinstance(kept, Encoded):
            return torch.ops.aten.threshold_backward(gradient, kept, 0), None, None
        dx = torch.empty_like(gradient)
        count = max(1, PIECE // (4 * kept.codes[0].numel()))
        for part, codes, target in zip(*(each.split(count) for each in (gradient, kept.codes, dx)), strict=True):
            # A product with 0 or 1: choosing element by element takes ten times as long.
            torch.mul(part, codes.clamp(0, 1), out=target)
        return dx, None, None


class MaxPool(torch.autograd.Function):
    """Max pooling over two dimensions that keeps the winners' places and no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...], keep: Keep) -> Tensor:
        """(batch, channels, height, width) → the same, smaller; `window`: kernel, stride, padding, dilation, ceil."""
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *window)
        ctx.kept, ctx.window, ctx.shape, ctx.order = keep(places), window, x.shape, memory_order(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """dX: each winner's gradient in its place."""
        # The input is asked for its shape alone.
        shaped = gradient.new_empty(()).expand(ctx.shape)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(gradient, shaped, *ctx.window, unpack(taken(ctx)))
        return dx.contiguous(memory_format=ctx.order), None, None


class BatchNorm(torch.autograd.Function):
    """Batch norm whose backward decodes some channels of its input at a time, on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor | None, Tensor | None],
        training: bool, momentum: float, epsilon: float, keep: Keep,
    ) -> Tensor:
        """(batch, channels, …) → the same."""
        y, mean, deviation = torch.native_batch_norm(x, weight, bias, *running, training, momentum, epsilon)
        ctx.kept, ctx.statistics = keep(x), (mean, deviation)
        ctx.weight, ctx.running, ctx.training, ctx.epsilon = weight, running, training, epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """(dX, dweight, dbias, …)."""
        wanted = list(ctx.needs_input_grad[:3])
        channels = gradient.shape[1]
        # Of a piece there are the decoded input, the gradient and the result.
        count = max(1, PIECE // (32 * max(1, gradient.numel() // channels)))
        order = memory_order(gradient) if gradient.dim() == 4 else torch.contiguous_format
        dx = torch.empty_like(gradient, memory_format=order) if wanted[0] else None
        sums: list[tuple[Tensor, Tensor]] = []
        kept = taken(ctx)
        for start in range(0, channels, count):
            part = slice(start, start + count)

            def of(tensor: Tensor | None, part: slice = part) -> Tensor | None:
                return None if tensor is None else tensor[part]

            x = decode(kept.codes[:, part], kept.exponent) if isinstance(kept, Encoded) else kept[:, part]
            of_x, *others = torch.ops.aten.native_batch_norm_backward(
                gradient[:, part].contiguous(memory_format=order), x.contiguous(memory_format=order), of(ctx.weight),
                of(ctx.running[0]), of(ctx.running[1]), of(ctx.statistics[0]), of(ctx.statistics[1]), ctx.training,
                ctx.epsilon, wanted)
            if dx is not None:
                dx[:, part] = of_x
            sums.append((others[0], others[1]))
        dw, db = (torch.cat(parts) if needed else None
                  for parts, needed in zip(zip(*sums, strict=True), wanted[1:], strict=True))
        return dx, dw, db, None, None, None, None, None
