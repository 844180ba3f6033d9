"""FLOPs, bytes moved and peak memory of whatever runs inside `Meter`, forward and backward apart."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


@dataclass(frozen=True)
class StepCost:
    """What one training step cost.

    Attributes:
        forward_flops, backward_flops: as `torch.utils.flop_counter` counts them: two a multiply-accumulate of
            convolutions, matrix products and attention; element-wise work is not counted.
        forward_bytes, backward_bytes: each ATen operation's operands read and results written, every tensor once an
            operation, views free; the optimizer's update counts as neither and stands in `update_bytes`.
        update_bytes: bytes moved outside forward and backward.
        peak_memory_bytes: the most that was allocated at once: parameters, gradients, optimizer state, activations.
            From CUDA's allocator on a GPU; on the CPU the sum of the live tensors' storages, without what a kernel
            takes for itself while it runs. None where it was not asked for.
    """

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int
    update_bytes: int
    peak_memory_bytes: int | None

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def bytes_moved(self) -> int:
        """Forward, backward and update."""
        return self.forward_bytes + self.backward_bytes + self.update_bytes


class _Traffic(TorchDispatchMode):
    """Adds up bytes moved, in backward or not; the ModuleTracker knows which."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.differentiated = 0
        self.backward = 0
        self.plain = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func in _FREE:
            return result
        read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # An in-place operation returns what it was given: it reads and writes it.
        moved = sum(leaf.numel() * leaf.element_size() for leaf in [*read.values(), *written])
        if self.tracker.is_bw:
            self.backward += moved
        elif torch.is_grad_enabled():
            self.differentiated += moved
        else:
            self.plain += moved
        return result


class LiveBytes(TorchDispatchMode):
    """Bytes of tensor storage alive, now and at most, while it is entered; dry runs on the meta device count as well.

    torch.distributed's MemTracker does the same but hooks every parameter's gradient, which fails on frozen ones.

    Args:
        tracked: tensors that are there already, and modules and optimizers whose tensors are, in any nesting.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once; set it to `now` to begin anew.

    Example:
        >>> import torch
        >>> with LiveBytes([]) as live:
        ...     _ = torch.zeros(100, device="meta") + 1
        >>> live.peak
        800
    """

    def __init__(self, tracked: Any) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.now = 0
        self.peak = 0
        for tensor in _tensors(tracked):
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


_FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format,
         torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default}


class _Phase(ModuleTracker):
    """Knows whether backward runs, and nothing of modules.

    Following modules takes gradient hooks on all their inputs and outputs, which keep alive what activation
    checkpointing frees: a peak measured so would be far too high.
    """

    def __enter__(self) -> _Phase:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def _product_flops(left: tuple[int, int], right: tuple[int, int], **_: Any) -> int:
    """Operations of a product of matrices of these shapes, (m, k) and (k, n)."""
    return 2 * left[0] * left[1] * right[1]


def _nothing(*_: Any, **__: Any) -> int:
    """Operations of what counts none."""
    return 0


@cache
def _one_kernel() -> dict[Any, Callable[..., int]]:
    """Operations with a kernel of their own that torch's counter would take apart, such as SiLU's backward.

    Their parts round differently than the kernel: a step that is measured would leave other weights.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found: dict[Any, Callable[..., int]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        library, _, operation = name.partition("::")
        if library == "aten" and has(name, "CompositeImplicitAutograd") and (has(name, "CPU") or has(name, "CUDA")):
            found[getattr(torch.ops.aten, operation.partition(".")[0])] = _nothing
    return found


class _Flops(FlopCounterMode):
    """A FlopCounterMode that remembers how much of its total fell into backward, and counts by no module."""

    def __init__(self) -> None:
        # torch's counter leaves out products of integers, which some processors run in place of those of floats.
        super().__init__(display=False, custom_mapping={**_one_kernel(), torch.ops.aten._int_mm: _product_flops})
        self.mod_tracker = _Phase()
        self.backward = 0

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        result = super()._count_flops(func_packet, out, args, kwargs)
        if self.mod_tracker.is_bw:
            self.backward += self.get_total_flops() - before
        return result


class Meter:
    """Measures what runs inside it: `with Meter(model, optimizer, x, y) as meter: step()`, then `meter.cost`.

    Runs eagerly (a compiled model is stepped through uncompiled) and slowly: meant for one step of many.

    Args:
        tracked: modules, optimizers and tensors that are in memory throughout and count towards the peak. With none,
            the peak is not measured.
    """

    def __init__(self, *tracked: nn.Module | torch.optim.Optimizer | Tensor) -> None:
        self.tracked = tracked
        self.cost: StepCost | None = None
        device = next(_tensors(tracked), torch.empty(0)).device
        self._cuda = device if device.type == "cuda" else None

    def __enter__(self) -> Meter:
        self._stack = ExitStack()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._memory = None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        elif self.tracked:
            self._memory = self._stack.enter_context(LiveBytes(self.tracked))
        self._flops = self._stack.enter_context(_Flops())
        self._traffic = self._stack.enter_context(_Traffic(self._flops.mod_tracker))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is not None:
            return
        peak = None
        if self._cuda is not None:
            peak = torch.cuda.max_memory_allocated(self._cuda)
        elif self._memory is not None:
            peak = self._memory.peak
        total = self._flops.get_total_flops()
        self.cost = StepCost(
            forward_flops=total - self._flops.backward,
            backward_flops=self._flops.backward,
            forward_bytes=self._traffic.differentiated,
            backward_bytes=self._traffic.backward,
            update_bytes=self._traffic.plain,
            peak_memory_bytes=peak,
        )


def _tensors(tracked: Any) -> Iterator[Tensor]:
    for item in tracked:
        if isinstance(item, nn.Module):
            for tensor in (*item.parameters(), *item.buffers()):
                yield tensor
                if tensor.grad is not None:
                    yield tensor.grad
        elif isinstance(item, torch.optim.Optimizer):
            yield from (leaf for leaf in tree_leaves(item.state_dict()) if isinstance(leaf, Tensor))
        elif isinstance(item, Tensor):
            yield item
