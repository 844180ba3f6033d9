"""The arithmetic of a network: inside it, convolutions, linear layers and what backward needs are fixed point.

A context rather than a change of the network: nothing is wrapped or replaced, so that other strategies may freeze,
prune or rebuild layers. Operands and what is kept for backward are rounded; what one operation hands to the next within
a layer (convolution, normalisation, activation) is read from the wide accumulator, as in hardware that fuses them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from layerlab_low_bit.method.attention import attention
from layerlab_low_bit.method.fixedpoint import LOWEST, encode, exponent_of, msb_histogram, round_to
from layerlab_low_bit.method.keeping import BatchNorm, Encoded, MaxPool, Places, ReLU, unpack
from layerlab_low_bit.method.products import Geometry, Product, Units
from layerlab_low_bit.method.store import Kind, Store, choose, not_finite

STORED = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "hardswish", "tanh", "sigmoid", "batch_norm",
    "group_norm", "instance_norm", "layer_norm", "local_response_norm", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d",
}
"""Operations whose tensors kept for backward are rounded; those of any other (the loss, attention) stay floats."""
SMALLEST = 1024
"""Elements below which a tensor kept for backward stays as it is."""


Parameters = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives the (name, parameter) pairs of the networks that may run."""


class Arithmetic(TorchFunctionMode):
    """Fixed point for everything that runs inside.

    Args:
        store: says the formats, takes the statistics.
        parameters: gives the (name, parameter) pairs of the networks that may run.
        stochastic: rounding of activations and weights, and of gradients.
        store_activations: keep what backward needs in b bits.
        units, exact: see `Product`; `exact` None: up to 8 bits.
    """

    def __init__(
        self, store: Store, parameters: Parameters, stochastic: tuple[bool, bool],
        store_activations: bool, units: Units, exact: bool | None,
    ) -> None:
        super().__init__()
        self.store, self.gathering = store, True
        self.stochastic_forward, self.stochastic_backward = stochastic
        self.aliases: dict[str, str] = {}
        self._store_activations, self._units, self._exact = store_activations, units, exact
        self._parameters = parameters
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._operation = ""
        # What runs in fixed point: function of torch → ours, with the same arguments.
        self._covered: dict[Any, Callable[..., Any]] = {
            functional.linear: self._linear,
            functional.conv1d: partial(self._convolution, 1, False),
            functional.conv2d: partial(self._convolution, 2, False),
            functional.conv_transpose1d: partial(self._transposed, 1),
            functional.conv_transpose2d: partial(self._transposed, 2),
            functional.multi_head_attention_forward: self._attention,
        }
        # What keeps less than PyTorch's own would decode for it.
        self._sparing: dict[Any, Callable[..., Any]] = {
            functional.relu: self._relu, torch.relu: self._relu, Tensor.relu: self._relu,
            torch.relu_: partial(self._relu, inplace=True), Tensor.relu_: partial(self._relu, inplace=True),
            functional.max_pool2d: self._max_pool, functional.batch_norm: self._batch_norm,
        }

    # ------------------------------------------------------------------------------------ one forward pass

    def __enter__(self) -> Arithmetic:
        self._calls: dict[str, int] = {}
        self._layer, self._learning = "input", torch.is_grad_enabled()
        self._cache: dict[tuple[Any, ...], tuple[weakref.ref[Any], Encoded, str]] = {}
        self._saving = torch.autograd.graph.saved_tensors_hooks(self.keep, unpack)
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._saving.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._saving.__exit__(*error)
        self._eager.__exit__(*error)
        self._cache.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        covered = self._covered.get(func)
        if covered is not None:
            x = args[0] if args else kwargs["input" if "input" in kwargs else "query"]
            if x.dtype == torch.float32:
                return covered(*args, **kwargs)
        before, self._operation = self._operation, getattr(func, "__name__", "")
        try:
            x = args[0] if args else kwargs.get("input")
            if func in self._sparing and self._keeps(x):
                return self._sparing[func](*args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self._operation = before

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])  # (rows, inputs)
        y = self.multiply(x, weight, weight, bias, None)
        return y if input.dim() == 2 else y.reshape(*input.shape[:-1], -1)

    def _convolution(
        self, dims: int, transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1, output_padding: Any = 0,
    ) -> Tensor:
        """A convolution over one or two dimensions; one dimension is the second of two."""
        if dims == 2 and input.dim() == 3:  # one image without a batch
            return self._convolution(
                dims, transposed, input[None], weight, bias, stride, padding, dilation, groups, output_padding)[0]
        x, w = input, weight
        if dims == 1:
            if input.dim() == 2:
                return self._convolution(
                    dims, transposed, input[None], weight, bias, stride, padding, dilation, groups, output_padding)[0]
            x, w = input.unsqueeze(2), weight.unsqueeze(2)  # (batch, channels, 1, length), (…, …, 1, kernel)
        stride, dilation = _pair(stride, dims, 1), _pair(dilation, dims, 1)
        if padding == "same":
            spread = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
            # The odd one goes below and right, as in torch.
            x = functional.pad(x, (spread[1] // 2, -(-spread[1] // 2), spread[0] // 2, -(-spread[0] // 2)))
        padding = (0, 0) if isinstance(padding, str) else _pair(padding, dims, 0)
        added = _pair(output_padding, dims, 0)
        y = self.multiply(x, w, weight, bias, Geometry(stride, padding, dilation, groups, transposed, added))
        return y.squeeze(2) if dims == 1 else y

    def _transposed(
        self, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Tensor:
        return self._convolution(
            dims, True, input, weight, bias, stride, padding, dilation, groups, output_padding)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Multi-head attention: its projections in fixed point, the products of activations in float32."""
        settings = inspect.signature(functional.multi_head_attention_forward).bind(query, key, value, *args, **kwargs)
        return attention(self._linear, **settings.arguments)

    def _keeps(self, x: Any) -> bool:
        """Whether something of an operation on x is kept for backward, in few bits."""
        return (self._store_activations and torch.is_grad_enabled() and x.requires_grad and x.dtype == torch.float32
                and x.dim() > 1 and x.numel() >= SMALLEST)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        y = ReLU.apply(input, inplace, self.keep)
        # That a function of autograd worked in place counts as one more change of the memory, which has codes already.
        key = _identity(y)
        found = self._cache.get((key[0], key[1] - 1, *key[2:]))
        if inplace and found is not None and found[0]() is not None:
            self._cache[key] = found
        return y

    def _max_pool(
        self, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:
        if return_indices or input.dim() != 4:
            pool: Any = functional.max_pool2d
            return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        sizes = (_pair(value, 2, 0) for value in (kernel_size, stride or kernel_size, padding, dilation))
        return MaxPool.apply(input, (*sizes, ceil_mode), self.keep)

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:
        if input.device.type != "cpu" or input.numel() == input.shape[1]:
            return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        running = running_mean, running_var
        return BatchNorm.apply(input, weight, bias, running, training, momentum, eps, self.keep)

    def multiply(
        self, x: Tensor, weight: Tensor, parameter: Tensor, bias: Tensor | None, geometry: Geometry | None
    ) -> Tensor:
        """A layer's output; its weight is `weight`, a view of `parameter`, by which it is named."""
        name = self._name(parameter)
        self._layer = self._numbered(name.removesuffix(".weight"))
        self._learning = torch.is_grad_enabled()
        of_weight = name if self._layer == name.removesuffix(".weight") else f"{self._layer}.weight"
        return _Layer.apply(x, weight, bias, self, (self._layer, of_weight), geometry)

    def _numbered(self, name: str) -> str:
        """The name itself at its first use in a forward pass, then with #2, #3, …"""
        count = self._calls[name] = self._calls.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def _name(self, weight: Tensor) -> str:
        found = self._names.get(id(weight))
        if found is None or found[0]() is not weight:
            self._names = {id(p): (weakref.ref(p), name) for name, p in self._parameters()}
            found = self._names.get(id(weight))
        return found[1] if found is not None else "layer.weight"

    # ------------------------------------------------------------------------------------ rounding

    def product(self, geometry: Geometry | None, *codes: Tensor) -> Product:
        """How a layer multiplies such codes."""
        exact = all(part.dtype == torch.int8 for part in codes) if self._exact is None else self._exact
        return Product(geometry, self._units, exact)

    def round(self, values: Tensor, name: str, kind: Kind, stochastic: bool, gather: bool) -> Encoded:
        """Round a tensor to the format that the store has for it; a tensor never seen gets its own.

        Args:
            values: float32.
            name: of the tensor in the store.
            kind: its kind there.
            stochastic: the rounding.
            gather: add its statistic to the store. Else NaN and Inf raise at once.

        Raises:
            Diverged: NaN or Inf, naming the layer.
        """
        bits, position, counts = self._format(values, name, kind, gather)
        try:
            codes = encode(values, bits, position, stochastic, counts)
        except ValueError:
            raise not_finite(name, "values that are NaN or Inf") from None
        return Encoded(codes, exponent_of(position, bits))

    def round_in_place(self, values: Tensor, name: str, kind: Kind, stochastic: bool, gather: bool) -> int:
        """As `round`, to the numbers that the codes stand for; returns the bytes that the codes would take."""
        bits, position, counts = self._format(values, name, kind, gather)
        try:
            return round_to(values, bits, position, stochastic, counts)
        except ValueError:
            raise not_finite(name, "values that are NaN or Inf") from None

    def _format(self, values: Tensor, name: str, kind: Kind, gather: bool) -> tuple[int, int, Tensor | None]:
        """(bits, position, histogram to be added to) of a tensor."""
        store = self.store
        index = store.find(name, kind) if gather else store.known(name)
        position = None if index is None else store.positions[index]
        bits = store.bits[index] if index is not None else store.width(kind)
        if position is None or store.steering == "current-max":
            # A second pass, over the tensor itself.
            share = store.saturation if store.steering == "statistic" else 0.0
            (position,) = choose(msb_histogram(values)[None], share)
            position = LOWEST if position is None else position
            if store.steering == "static" and index is not None:
                position += store.headroom(index)
            if index is not None:
                store.positions[index] = position
        return bits, position, store.row(index) if gather and index is not None else None

    def operand(self, values: Tensor, name: str, kind: Kind) -> Encoded:
        """Round an operand of a layer's forward pass; once for all who read the same memory."""
        learning = self._learning
        stochastic = self.stochastic_forward and learning
        if kind == "weight":
            return self.round(values, name, kind, stochastic, self.gathering and learning)
        key = _identity(values)
        found = self._cache.get(key)
        if found is not None and found[0]() is not None:
            self.aliases[name] = found[2]
            return found[1]
        if not learning:
            # What was rounded as another operation's tensor in training has its format.
            name = self.aliases.get(name, name)
        rounded = self.round(values, name, kind, stochastic, self.gathering and learning)
        if learning:
            self._cache[key] = (weakref.ref(values.untyped_storage()), rounded, name)
        return rounded

    def keep(self, tensor: Tensor) -> Any:
        """A tensor as it is kept for backward: codes, places, or the tensor itself."""
        if self._operation not in STORED or not self._store_activations or tensor.numel() < SMALLEST:
            return tensor
        if tensor.dtype == torch.int64:
            return Places(tensor.to(torch.int16 if int(tensor.max()) < 2**15 else torch.int32))
        if tensor.dtype != torch.float32 or tensor.dim() < 2 or isinstance(tensor, nn.Parameter):
            return tensor
        return self.operand(tensor, self._stored_name(tensor), "activation")

    def _stored_name(self, tensor: Tensor) -> str:
        # Numbered only if it is rounded here: what has codes already needs no name.
        found = self._cache.get(_identity(tensor))
        name = f"{self._layer}.{self._operation.strip('_')}"
        return name if found is not None and found[0]() is not None else self._numbered(name)


class _Layer(torch.autograd.Function):
    """A convolution or linear layer on codes; keeps the codes for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic, names: tuple[str, str],
        geometry: Geometry | None,
    ) -> Tensor:
        layer, of_weight = names
        of_x = arithmetic.operand(x, f"{layer}.input", "activation")
        of_w = arithmetic.operand(weight, of_weight, "weight")
        ctx.arithmetic, ctx.layer, ctx.geometry = arithmetic, layer, geometry
        ctx.exponents = of_x.exponent, of_w.exponent
        ctx.shapes = x.shape, weight.shape
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(of_x.codes if needs_w else None, of_w.codes if needs_x else None)
        y = arithmetic.product(geometry, of_x.codes, of_w.codes).forward(of_x.codes, of_w.codes)
        y.mul_(2.0 ** (of_x.exponent + of_w.exponent))
        if bias is not None:
            y += bias if geometry is None else bias.view(-1, 1, 1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        arithmetic = ctx.arithmetic
        x, w = ctx.saved_tensors
        dy = arithmetic.round(
            gradient, f"{ctx.layer}.error", "error", arithmetic.stochastic_backward, arithmetic.gathering
        )
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            product = arithmetic.product(ctx.geometry, dy.codes, w)
            dx = product.input_gradient(dy.codes, w, ctx.shapes[0]).mul_(2.0 ** (dy.exponent + ctx.exponents[1]))
        if ctx.needs_input_grad[1]:
            product = arithmetic.product(ctx.geometry, dy.codes, x)
            dw = product.weight_gradient(dy.codes, x, ctx.shapes[1]).mul_(2.0 ** (dy.exponent + ctx.exponents[0]))
        if ctx.needs_input_grad[2]:
            places = (0,) if ctx.geometry is None else (0, 2, 3)
            db = dy.codes.sum(places, dtype=torch.int64).float().mul_(2.0**dy.exponent)
        return dx, dw, db, None, None, None


def _pair(value: Any, dims: int, first: int) -> tuple[int, int]:
    """(vertical, horizontal) of a convolution's setting; of one over one dimension, `first` and its own."""
    own = (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))
    return (first, own[0]) if dims == 1 else (own[0], own[1])


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that show the same memory in the same state."""
    return (tensor.untyped_storage()._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride())
