"""The paper's order in PyTorch: backward functions of convolution, linear, ReLU and pooling that need less at once.

Every function computes with the operations that PyTorch's own backward is made of; what changes is when each runs and
what is let go in between.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from layerlab import LayerlabError
from layerlab_memory_reorder.method.plan import Order, weight_first

# Below this, the input gradient is computed by the very call that PyTorch's backward makes; see _input_gradient.
_SMALL = 2**20
# Elements of a max pooling's result that are worked on at a time: its winners come as 8 bytes each.
_CHUNK = 2**21


class Updater:
    """Applies an optimizer's update to one parameter as soon as its gradient is there, and frees the gradient.

    The optimizer's own `step` does it, shown one parameter at a time, so that its state stays where checkpoints look
    for it and its learning rate is the schedule's.

    Args:
        optimizer: one whose update of a parameter depends on that parameter alone.

    Raises:
        LayerlabError: LBFGS; or functions registered around its step, such as clipping the whole model's gradient,
            which would see one gradient at a time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise LayerlabError("memory-reorder updates one layer at a time and LBFGS needs all gradients at once; "
                                "use another optimizer, such as sgd or adamw.")
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise LayerlabError(
                "memory-reorder frees each gradient as soon as it is applied, so that a function registered around the "
                "optimizer's step (clipping the whole model's gradient, say) would see one gradient at a time; remove "
                "it."
            )
        self.optimizer = optimizer
        self._group = {p: group for group in optimizer.param_groups for p in group["params"]}

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer has this parameter."""
        return parameter in self._group

    def apply(self, parameter: nn.Parameter) -> None:
        """Update from `parameter.grad` and free it."""
        self._step(parameter, self._group[parameter])
        parameter.grad = None

    def takes_rows(self, parameter: Tensor) -> bool:
        """Whether the update is element by element with state that starts from zero, so that rows can go one by one."""
        group, kind = self._group.get(parameter), type(self.optimizer)
        if group is None:
            return False
        if kind is torch.optim.SGD:
            return group["dampening"] == 0
        return kind in (torch.optim.Adam, torch.optim.AdamW)

    def prepare(self, parameter: Tensor) -> None:
        """Make the state that the optimizer's first step would make, as zeros."""
        group, state = self._group[parameter], self.optimizer.state[parameter]
        if type(self.optimizer) is torch.optim.SGD:
            if group["momentum"] and state.get("momentum_buffer") is None:
                # 0·m + g = g: the same as the copy of g that the first step makes.
                state["momentum_buffer"] = torch.zeros_like(parameter)
            return
        if state:
            return
        counts_on_device = group["capturable"] or group["fused"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if counts_on_device else "cpu")
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for name in names:
            state[name] = torch.zeros_like(parameter)

    def apply_rows(self, parameter: Tensor, rows: slice, gradient: Tensor) -> None:
        """Update some rows of a parameter whose state is prepared; `advance` counts the step once for all."""
        state = self.optimizer.state[parameter]
        part = parameter.detach()[rows]
        part.grad = gradient
        # Rows are views, so that what the step writes lands in the whole; the step count must not, or it would rise
        # with every part.
        self.optimizer.state[part] = {
            name: value[rows] if isinstance(value, Tensor) and value.shape == parameter.shape
            else value.clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        try:
            self._step(part, self._group[parameter])
        finally:
            del self.optimizer.state[part]

    def advance(self, parameter: Tensor) -> None:
        """Count a step that `apply_rows` made in parts."""
        if "step" in self.optimizer.state[parameter]:
            self.optimizer.state[parameter]["step"] += 1

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups


@dataclass(eq=False)
class _Layer:
    """What a convolution's or linear layer's functions need to know.

    Attributes:
        module: the layer.
        takeover: its owner.
        masks: whether this layer's input comes from a ReLU that leaves its own backward to this one.
    """

    module: Any
    takeover: Takeover
    masks: bool = False


def _gone() -> LayerlabError:
    return LayerlabError("memory-reorder frees activations during backward, so that one graph serves one backward; "
                         "run the forward pass again.")


def _taken(ctx: Any) -> Any:
    """The kept operand, or None where none was needed; the function itself holds it no longer."""
    x, ctx.x = ctx.x, None
    if x is None:
        if ctx.kept:
            raise _gone()
        return None
    if x._version != ctx.version:
        raise RuntimeError("an activation needed for the gradient was modified in place after the forward pass; "
                           "memory-reorder, like PyTorch, cannot compute the gradient from it.")
    return x


class _Parametric(Function):
    """Convolution or linear: dW and dX in the planned order, the input let go as soon as nothing reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.layer = layer
        ctx.shape, ctx.options = x.shape, {"dtype": x.dtype}
        ctx.has_bias = bias is not None
        masks = layer.masks and ctx.needs_input_grad[0]
        # Not saved through autograd, which would hold the input until this whole function has run.
        ctx.x = x.detach() if ctx.needs_input_grad[1] or masks else None
        ctx.version = x._version
        ctx.kept = ctx.x is not None
        ctx.save_for_backward(weight)
        module = layer.module
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        return module._conv_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        layer: _Layer = ctx.layer
        x = _taken(ctx)
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        linear = isinstance(layer.module, nn.Linear)
        dx = dw = db = None
        if linear and ctx.has_bias and needs_db:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        if linear and needs_dw and needs_dx and layer.takeover.goes_last(weight, x):
            dx = torch.matmul(dy, weight)
            if layer.masks:
                dx.masked_fill_(x <= 0, 0)
            layer.takeover.apply_slabs(weight, dy, x)
            return dx, None, db, None
        if linear and needs_dw and not needs_dx and layer.takeover.in_slabs(weight):
            layer.takeover.apply_slabs(weight, dy, x)
            return None, None, db, None
        if needs_dw and linear:
            dw = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        elif not linear and (needs_dw or needs_db):
            dw, db = _weight_gradient(layer.module, dy, x, weight, ctx.shape, needs_dw, ctx.has_bias and needs_db)
        mask = None
        if needs_dx and layer.masks:
            mask = x <= 0
        # The last reference here: unless someone else holds it, the input gradient takes over its memory.
        del x
        if needs_dx:
            dx = torch.matmul(dy, weight) if linear else _input_gradient(layer.module, dy, weight, ctx.shape)
            if mask is not None:
                dx.masked_fill_(mask, 0)
        return dx, dw, db, None


def _weight_gradient(
    module: Any, dy: Tensor, x: Tensor | None, weight: Tensor, shape: torch.Size, needs_dw: bool, needs_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not needs_dw:
        return None, dy.sum((0, *range(2, dy.dim()))) if needs_db else None
    _, dw, db = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], module.stride, module.padding, module.dilation, False,
        [0] * (weight.dim() - 2), module.groups, [False, True, needs_db])
    return dw, db if needs_db else None


def _input_gradient(module: Any, dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """dX of a convolution, from dY and the weights alone."""
    zeros = [0] * (weight.dim() - 2)
    if math.prod(shape) * dy.element_size() <= _SMALL:
        # convolution_backward makes a copy of the input for itself even when only dX is asked for and only the input's
        # shape counts: not worth avoiding here, and for small shapes PyTorch picks other algorithms.
        unread = dy.new_empty(1).expand(shape)
        return torch.ops.aten.convolution_backward(
            dy, unread, weight, None, module.stride, module.padding, module.dilation, False, zeros, module.groups,
            [True, False, False])[0]
    # The transposed convolution is the same computation without that copy.
    rest = [
        size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in zip(
            shape[2:], dy.shape[2:], module.stride, module.padding, module.dilation, weight.shape[2:], strict=True)
    ]
    return torch.ops.aten.convolution(
        dy, weight, None, module.stride, module.padding, module.dilation, True, rest, module.groups)


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
            raise _gone()
        codes, ctx.codes = ctx.codes, None
        dx = torch.empty_strided(ctx.shape, ctx.strides, dtype=dy.dtype, device=dy.device)
        at = 0
        for code in codes:
            part, given = dx[at: at + len(code)], dy[at: at + len(code)]
            at += len(code)
            winner = code.to(torch.int64)
            if ctx.masks:
                given = given.masked_fill(winner < 0, 0)
                winner.clamp_(min=0)
            winner.add_(ctx.base)
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
        x = _taken(ctx)
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
    return x.split(max(1, _CHUNK * len(x) // max(1, x.numel())))


def _format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _images_at_once(x: Tensor, settings: tuple[Any, ...]) -> int:
    stride = settings[1]
    return max(1, _CHUNK * stride[0] * stride[1] // max(1, math.prod(x.shape[1:])))


def _first_elements(y: Tensor, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """The index of each window's first element, (rows, columns), negative where it lies in the padding."""
    _, (down, right), (top, left), _, _ = settings
    rows = torch.arange(y.shape[2], device=x.device).mul_(down).sub_(top)
    columns = torch.arange(y.shape[3], device=x.device).mul_(right).sub_(left)
    return rows.unsqueeze(1) * x.shape[3] + columns


def _pool_settings(module: nn.MaxPool2d) -> tuple[Any, ...] | None:
    """(kernel, stride, padding, dilation, ceil_mode) as pairs; None for a kind that is left to PyTorch."""
    def pair(value: Any) -> list[int]:
        return list(value) if isinstance(value, (tuple, list)) else [value, value]

    kernel, padding = pair(module.kernel_size), pair(module.padding)
    # A code must tell "nothing" from a distance, so that no distance may be negative.
    if module.return_indices or pair(module.dilation) != [1, 1]:
        return None
    return kernel, pair(module.stride), padding, [1, 1], module.ceil_mode


@dataclass
class Takeover:
    """Takes over a network's backward and update, until `detach` leaves it as it was.

    Between `attach` and `detach`, `loss.backward()` applies and frees the gradients of large weights as they come;
    `finish` applies those of small ones and of weights that are used more than once. Call it after each backward in
    the place of `optimizer.step()`.

    Attributes:
        model: the network; layers that are not convolution, linear, ReLU, max pooling or local response
            normalisation keep PyTorch's backward.
        optimizer: see `Updater`.
        example: images as the network takes them; two of them are run through it in evaluation mode.
        order: `larger-first`, or `weight-first` in every layer.
        slab: bytes of a linear layer's weight gradient that exist at a time where it goes last; 0: all of it, and it
            goes first.
        at_once: weights of fewer bytes are updated at the step's end, all together.
        fuse: ReLU and max pooling keep signs and places instead of activations, where nothing else needs these; local
            response normalisation keeps its operand alone.
        checkpointing: blocks keep their input only and are computed again in backward.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    example: Tensor
    order: Order = "larger-first"
    slab: int = 16 * 2**20
    at_once: int = 2**18
    fuse: bool = True
    checkpointing: bool = False
    updater: Updater = field(init=False)
    _undo: list[Callable[[], None]] = field(init=False, default_factory=list)
    _several: set[nn.Parameter] = field(init=False, default_factory=set)
    _sliced: set[Tensor] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.updater = Updater(self.optimizer)

    def __enter__(self) -> Takeover:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the functions and hooks in place for the parameters that learn at present."""
        self.detach()
        uses = weight_uses(self.model, self.example)
        self._several = {p for p, count in uses.items() if count != 1}
        for parameter in self.model.parameters():
            if parameter.requires_grad and self.updater.holds(parameter):
                handle = parameter.register_post_accumulate_grad_hook(self._arrived)
                self._undo.append(handle.remove)
        masked = _masked_by_reader(self.model) if self.fuse else {}
        readers = set(masked.values())
        for module in self.model.modules():
            if module in masked:
                self._patch(module, _relu_forward(module, masked[module]))
            elif type(module) is nn.Linear or (type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
                                               and _plain_padding(module)):
                self._patch(module, _parametric_forward(_Layer(module, self, module in readers)))
            elif type(module) is nn.MaxPool2d and self.fuse and _pool_settings(module) is not None:
                self._patch(module, _pool_forward(module, module in readers))
            elif type(module) is nn.LocalResponseNorm and self.fuse:
                self._patch(module, _norm_forward(module))
        if self.checkpointing:
            checkpoint_blocks(self.model, self._patch)

    def detach(self) -> None:
        """Leave the network as it was before `attach`."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._sliced.clear()

    def finish(self) -> None:
        """Apply and free the gradients that `backward` has left, all at once."""
        self._sliced.clear()
        if any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def in_slabs(self, weight: Tensor) -> bool:
        """Whether a linear layer's weight gradient may be made and applied in parts."""
        return bool(self.slab and weight.is_leaf and weight.nbytes > self.slab and weight not in self._several
                    and weight.grad is None and self.updater.takes_rows(weight))

    def goes_last(self, weight: Tensor, x: Tensor | None) -> bool:
        """Whether the plan computes this layer's input gradient before its weight gradient."""
        return (self.order == "larger-first" and x is not None and self.in_slabs(weight)
                and not weight_first(x.nbytes, weight.nbytes, self.slab))

    def apply_slabs(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        """Make a linear layer's weight gradient some rows at a time and apply each at once."""
        if weight in self._sliced:
            raise LayerlabError("A weight was used twice in this step, but only once when the network was examined; "
                                "set slab=0 for a network that changes from batch to batch.")
        self._sliced.add(weight)
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = max(1, self.slab * weight.shape[0] // weight.nbytes)
        self.updater.prepare(weight)
        for start in range(0, weight.shape[0], rows):
            part = slice(start, min(start + rows, weight.shape[0]))
            self.updater.apply_rows(weight, part, dy[:, part].t() @ x)
        self.updater.advance(weight)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            # Autograd calls this too when a function had no gradient to give.
            return
        if parameter in self._sliced:
            raise LayerlabError("A weight was used twice in this step, but only once when the network was examined; "
                                "set slab=0 for a network that changes from batch to batch.")
        if parameter.nbytes >= self.at_once and parameter not in self._several:
            self.updater.apply(parameter)

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one module another forward, in training only."""
        original, own = module.forward, "forward" in vars(module)

        @torch.compiler.disable
        def chosen(*arguments: Any, **options: Any) -> Any:
            if module.training:
                return forward(original, *arguments, **options)
            return original(*arguments, **options)

        module.forward = chosen

        def undo() -> None:
            if own:
                module.forward = original
            else:
                del module.forward

        self._undo.append(undo)


def _plain_padding(module: Any) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _parametric_forward(layer: _Layer) -> Callable[..., Tensor]:
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


def _relu_forward(module: Any, reader: nn.Module) -> Callable[..., Tensor]:
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not reader.training:
            # Someone set the reader alone to evaluation, where it keeps PyTorch's backward, which masks nothing.
            return original(x)
        # An operand that is a leaf or a view of one must not be written over inside a function.
        inplace = module.inplace and x.grad_fn is not None
        return _SignLater.apply(x, inplace)

    return forward


def _pool_forward(module: nn.MaxPool2d, masks: bool) -> Callable[..., Tensor]:
    settings = _pool_settings(module)

    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if x.dim() == 3:
            return _MaxPool.apply(x.unsqueeze(0), settings, masks).squeeze(0)
        return _MaxPool.apply(x, settings, masks)

    return forward


def _norm_forward(module: nn.LocalResponseNorm) -> Callable[..., Tensor]:
    def forward(original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # Autocast picks another precision for each of its operations.
            return original(x)
        return _ResponseNorm.apply(x, module)

    return forward


def weight_uses(model: nn.Module, example: Tensor) -> Counter[nn.Parameter]:
    """How many operations of a forward pass each learning parameter goes into, from the graph that autograd records.

    Args:
        model: run once in evaluation mode, its modes restored.
        example: images; the first two are used.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            result = model(example[:2])
    finally:
        for module, mode in modes.items():
            module.training = mode
    uses: Counter[nn.Parameter] = Counter()
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None and hasattr(following, "variable"):
                uses[following.variable] += 1
            else:
                waiting.append(following)
    return uses


def _masked_by_reader(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """ReLUs whose result exactly one convolution, linear layer or max pooling reads → that reader.

    Both must be called once; a network that cannot be traced has none.
    """
    from layerlab_memory_reorder.method.plan import symbolic

    try:
        graph = symbolic(model)
    except LayerlabError:
        return {}
    modules = dict(model.named_modules())
    calls = Counter(modules.get(str(node.target)) for node in graph.graph.nodes if node.op == "call_module")
    found: dict[nn.Module, nn.Module] = {}
    for node in graph.graph.nodes:
        relu = _called(node, modules)
        if type(relu) is not nn.ReLU or calls[relu] != 1 or len(node.users) != 1:
            continue
        # Written over its operand, which somebody else reads: left to PyTorch, which notices.
        if relu.inplace and any(len(each.users) != 1 for each in node.all_input_nodes):
            continue
        reader = _called(next(iter(node.users)), modules)
        takes = (type(reader) is nn.Linear or (type(reader) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
                 and _plain_padding(reader)) or (type(reader) is nn.MaxPool2d and _pool_settings(reader) is not None))
        if takes and calls[reader] == 1:
            found[relu] = reader
    return found


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return modules.get(str(node.target)) if node.op == "call_module" else None


# ------------------------------------------------------------------------------------ checkpointing


def checkpoint_blocks(
    model: nn.Module, patch: Callable[[nn.Module, Callable[..., Any]], None], reentrant: bool = True
) -> None:
    """Let every block of a network keep its input only and compute the rest again in backward.

    Blocks are the modules inside lists of blocks (a residual block, an Inception module) and, in plain lists of layers
    with convolutions, the stretches that end with a pooling.

    Args:
        model: the network.
        patch: gives a module another forward, which gets the original one as its first argument.
        reentrant: as in `torch.utils.checkpoint`; a forward without graph, as this package's functions need it.
    """
    for block in _blocks(model):
        plain = isinstance(block, nn.Sequential) and not any(list(child.children()) for child in block)
        patch(block, _stretch_forward(_stretches(block), reentrant) if plain else _block_forward(block, reentrant))


def _stretch_forward(stretches: list[nn.Sequential], reentrant: bool) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], x: Tensor) -> Tensor:
        for stretch in stretches:
            few = sum(isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for layer in stretch) < 2
            # With one convolution, ReLU and pooling, this package's functions keep little but the input.
            x = stretch(x) if reentrant and few else _checkpointed(stretch, stretch, x, reentrant)
        return x

    return forward


def _block_forward(block: nn.Module, reentrant: bool) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], x: Any) -> Any:
        return _checkpointed(original, block, x, reentrant)

    return forward


def _checkpointed(call: Callable[..., Any], block: nn.Module, x: Any, reentrant: bool) -> Any:
    learns = any(p.requires_grad for p in block.parameters())
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not (learns or x.requires_grad):
        return call(x)
    keep_random = x.device.type != "meta"
    if not reentrant:
        return checkpoint(call, x, use_reentrant=False, preserve_rng_state=keep_random)
    # The images need no gradient, but without an operand that does the reentrant form records nothing.
    wanted = torch.empty(0, device=x.device, requires_grad=True)

    def again(x: Tensor, _: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return call(x)
        with _still_statistics(block):
            return call(x)

    return checkpoint(again, x, wanted, use_reentrant=True, preserve_rng_state=keep_random)


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch but leave their running statistics alone: they have seen this batch."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        inner = list(child.children())
        if not inner:
            continue
        if isinstance(child, nn.Sequential) and any(list(each.children()) for each in inner):
            found += _blocks(child)
        elif any(isinstance(each, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for each in child.modules()):
            found.append(child)
    return found


def _stretches(layers: Any) -> list[nn.Sequential]:
    """The layers cut after each pooling, or into about √n parts before a convolution where there is none."""
    parts: list[list[nn.Module]] = [[]]
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in layers)
    convolutions = [index for index, layer in enumerate(layers) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    size = max(1, math.isqrt(len(convolutions)))
    cuts = set(convolutions[size::size])
    for index, layer in enumerate(layers):
        if not pools and index in cuts:
            parts.append([])
        parts[-1].append(layer)
        if pools and isinstance(layer, nn.MaxPool2d):
            parts.append([])
    return [nn.Sequential(*part) for part in parts if part]
