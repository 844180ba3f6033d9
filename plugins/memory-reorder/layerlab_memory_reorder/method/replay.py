"""Stretches of a network's forward pass that keep little and are computed again in backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

from layerlab_memory_reorder.method.checkpointing import still_statistics
from layerlab_memory_reorder.method.keeping import gone
from layerlab_memory_reorder.method.operations import Layer, kept_through_replays
from layerlab_memory_reorder.method.program import Program

Marks = Callable[[str, int], None]
"""Told (`forward` or `backward`, number of the stretch) where that begins."""


@dataclass(frozen=True)
class Group:
    """Neighbouring stretches that are computed again together.

    Attributes:
        first, last: numbers of the stretches, both included.
        again: False keeps what backward needs, as PyTorch does; True keeps the input and computes the rest again.
        dropped: names of the convolutions and linear layers in them that are computed again as well; the results of
            the others are kept. Empty without `again`.
    """

    first: int
    last: int
    again: bool = False
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """Which stretches of a network are computed again in backward.

    Attributes:
        operations: names of the program's operations, by which the network is known again.
        borders: (start, stop) of each stretch.
        groups: all stretches, in order.
        by_channels: whether large convolutions and batch norms are computed some channels at a time, see
            `method.parts`.
    """

    operations: tuple[str, ...]
    borders: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]
    by_channels: bool = False

    def fits(self, program: Program) -> bool:
        """Whether it was made for this program."""
        return self.operations == tuple(node.name for node in program.nodes)

    def state(self) -> dict[str, Any]:
        """Lists and numbers, for a checkpoint."""
        groups = [[each.first, each.last, each.again, sorted(each.dropped)] for each in self.groups]
        return {"operations": list(self.operations), "borders": [list(each) for each in self.borders],
                "groups": groups, "by_channels": self.by_channels}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Schedule:
        """What `state` gave."""
        groups = tuple(Group(first, last, again, frozenset(dropped))
                       for first, last, again, dropped in state["groups"])
        borders = tuple((start, stop) for start, stop in state["borders"])
        return cls(tuple(state["operations"]), borders, groups, state.get("by_channels", False))


class Replayed:
    """A network's forward pass in groups of stretches, some of which keep their input and are computed again.

    Args:
        program: of the network.
        schedule: made for it.
        layers: name of each convolution and linear layer that this package runs → what its functions know.
        marks: told of each stretch's beginning, for measuring; None in training.
    """

    def __init__(
        self, program: Program, schedule: Schedule, layers: dict[str, Layer], marks: Marks | None = None,
    ) -> None:
        self.program = program
        self.marks = marks
        self.parts = [_Part(self, group, schedule.borders[group.first: group.last + 1], layers)
                      for group in schedule.groups]

    def __call__(self, x: Tensor) -> Any:
        """The network's result."""
        values: dict[fx.Node, Any] = {self.program.input: x}
        del x
        for part in self.parts:
            part(values)
        return self.program.output(values)


class _Part:
    """One group at work."""

    def __init__(
        self, owner: Replayed, group: Group, borders: Sequence[tuple[int, int]], layers: dict[str, Layer]
    ) -> None:
        program = owner.program
        self.program, self.marks, self.group, self.borders = program, owner.marks, group, borders
        start, stop = borders[0][0], borders[-1][1]
        self.inside = program.nodes[start:stop]
        read = {each for node in self.inside for each in node.all_input_nodes if each.op != "get_attr"}
        self.inputs = [node for node in program.crossing(start) if node in read]
        self.outputs = [node for node in self.inside if program.last_use[node] >= stop]
        named = [str(node.target) for node in self.inside if node.op == "call_module"]
        calls = Counter(named)
        self.keepers = [layers[name] for name in calls if group.again and name in layers and name not in group.dropped]
        self.called = nn.ModuleList([program.modules[name] for name in calls])

    def __call__(self, values: dict[fx.Node, Any]) -> None:
        given = [values[node] for node in self.inputs]
        tensors = [each for each in given if isinstance(each, Tensor)]
        learns = any(each.requires_grad for each in chain(tensors, self.called.parameters()))
        if not self.group.again or not learns or not torch.is_grad_enabled():
            del given, tensors
            self.compute(values)
            return
        # Values that nobody behind this group reads.
        for node in self.inputs:
            if self.program.last_use[node] < self.borders[-1][1]:
                del values[node]
        # The images need no gradient, but without an operand that does nothing would be recorded.
        wanted = torch.empty(0, device=tensors[0].device, requires_grad=True)
        fixed = [None if isinstance(each, Tensor) else each for each in given]
        arrived: list[_Gradient] = [_Gradient() for _ in self.outputs]
        results = _Again.apply(self, fixed, arrived, wanted, *tensors)
        del given, tensors
        for node, result, gradient in zip(self.outputs, results, arrived, strict=True):
            differentiable = isinstance(result, Tensor) and result.requires_grad
            values[node] = _Taken.apply(result, gradient) if differentiable else result
        self._mark_backward(values, self.group.last)

    def compute(self, values: dict[fx.Node, Any], marking: bool = True) -> None:
        """Compute the group's operations from what is in `values`."""
        marks = self.marks if marking else None
        for number, (start, stop) in enumerate(self.borders, self.group.first):
            if marks is not None:
                marks("forward", number)
            self.program.run(start, stop, values)
            if marks is not None and torch.is_grad_enabled():
                self._mark_backward(values, number)

    def again(self, given: Sequence[Any], marking: bool) -> list[Any]:
        """The group's results from its inputs."""
        values = dict(zip(self.inputs, given, strict=True))
        self.compute(values, marking)
        return [values[node] for node in self.outputs]

    def _mark_backward(self, values: dict[fx.Node, Any], number: int) -> None:
        marks = self.marks
        if marks is None:
            return
        start, stop = self.borders[number - self.group.first]
        for node in self.program.nodes[start:stop]:
            result = values.get(node)
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(lambda _: marks("backward", number))


class _Again(Function):
    """A group that keeps its inputs, and the results of some of its layers, and is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, part: _Part, fixed: list[Any], arrived: list[_Gradient], wanted: Tensor, *tensors: Tensor
    ) -> tuple[Any, ...]:
        ctx.part, ctx.fixed, ctx.arrived = part, fixed, arrived
        ctx.set_materialize_grads(False)
        ctx.kept = [each.detach() for each in tensors]
        ctx.versions = [each._version for each in tensors]
        ctx.learning = ctx.needs_input_grad[4:]
        ctx.state = _State(tensors)
        with kept_through_replays(part.keepers) as ctx.results:
            return tuple(part.again(_filled(fixed, [each.detach() for each in tensors]), marking=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise gone()
        kept, ctx.kept = ctx.kept, None
        if [each._version for each in kept] != ctx.versions:
            raise RuntimeError("an activation needed for the gradient was modified in place after the forward pass; "
                               "memory-reorder, like PyTorch, cannot compute the gradient from it.")
        part, found = ctx.part, [None] * len(kept)
        results, ctx.results = ctx.results, None
        with torch.enable_grad():
            with ctx.state.restored(), still_statistics(part.called), kept_through_replays(part.keepers, results):
                entered = []
                for index, learns in enumerate(ctx.learning):
                    given, kept[index] = kept[index], None
                    entered.append(_enter(given, found, index) if learns else given)
                    del given
                again = part.again(_filled(ctx.fixed, entered), marking=False)
            del entered
            edges, given = _ends(again, ctx.arrived)
            if edges:
                torch.autograd.backward(edges, given)
        return None, None, None, None, *found


class _Gradient:
    """A gradient on its way from one function to another past autograd, which holds what it gives until a function
    has run, and gives nothing away while it runs."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def put(self, gradient: Tensor) -> Tensor:
        """Keep it; returns a tensor of its shape that takes no memory, for autograd."""
        self._held = gradient
        return gradient.new_zeros(()).expand(gradient.shape)

    def taken(self) -> Tensor | None:
        """What was put, which is held no longer; None where there was none."""
        held, self._held = self._held, None
        return held


class _Taken(Function):
    """Nothing, and in backward the gradient leaves autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: _Gradient) -> Tensor:
        ctx.gradient = gradient
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.put(dy), None


class _Given(Function):
    """Nothing, and in backward the gradient that left autograd enters it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = _Gradient()
        ctx.gradient.put(gradient)
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.gradient.taken(), None


def _ends(results: list[Any], arrived: Sequence[_Gradient]) -> tuple[list[Any], list[Tensor]]:
    """Where a backward begins: edges in the place of the results, so that what nobody else needs of these is free
    during backward, and gradients without memory; the real ones wait behind the edges."""
    edges, given = [], []
    for index, gradient in enumerate(arrived):
        result, results[index], held = results[index], None, gradient.taken()
        if isinstance(result, Tensor) and result.requires_grad and held is not None:
            edges.append(get_gradient_edge(_Given.apply(result, held)))
            given.append(held.new_zeros(()).expand(held.shape))
    return edges, given


def _filled(fixed: list[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Values that are no tensors, with the tensors in the gaps."""
    following: Iterator[Tensor] = iter(tensors)
    return [next(following) if each is None else each for each in fixed]


def _enter(x: Tensor, found: list[Any], index: int) -> Tensor:
    return _Entry.apply(torch.empty(0, device=x.device, requires_grad=True), x, found, index)


class _Entry(Function):
    """An operand whose gradient is put into a list. Unlike a leaf of the graph it does not hold its memory."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, x: Tensor, found: list[Any], index: int) -> Tensor:
        ctx.found, ctx.index = found, index
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, ...]:
        ctx.found[ctx.index] = dx
        return None, None, None, None


class _State:
    """Random states and autocast as they are now, to compute the same again."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        self.random = None if self.device.type == "meta" else torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors) if self.device.type == "cuda" else ([], [])
        kind = self.device.type
        self.autocast = None
        if kind != "meta" and torch.is_autocast_enabled(kind):
            self.autocast = (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These states in the block, and those of before afterwards."""
        kind = self.device.type
        casting: Any = nullcontext()
        if self.autocast is not None:
            casting = torch.autocast(kind, self.autocast[0], cache_enabled=self.autocast[1])
        with torch.random.fork_rng(self.devices, enabled=self.random is not None), casting:
            if self.random is not None:
                torch.set_rng_state(self.random)
                set_device_states(self.devices, self.states)
            yield
