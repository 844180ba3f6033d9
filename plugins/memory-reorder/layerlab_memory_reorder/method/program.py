"""A network's forward pass as a list of operations, of which stretches can be computed again in backward."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

from layerlab import Refused, first_line
from layerlab_memory_reorder.method.checkpointing import still_statistics
from layerlab_memory_reorder.method.operations import Layer, gone, kept_through_replays

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


class Program:
    """The operations of a network that `torch.fx` can follow, in order, in training.

    Args:
        model: with the modes in which it trains; parts that another module calls are looked into, layers are not.

    Attributes:
        nodes: the operations, without the input and the output.
        last_use: operation → position of the last one that reads its result; the number of operations for the output.

    Raises:
        Refused: `torch.fx` cannot follow it, or it takes or gives more than one tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        graph = _followed(model)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1:
            raise Refused(f"{type(model).__name__} takes {len(inputs)} inputs; a memory budget needs a network that "
                          "takes one tensor.")
        self.input = inputs[0]
        self._check_hooks(model, graph)
        self.nodes = [node for node in graph.nodes if node.op in ("call_module", "call_function", "call_method")]
        self.result = next(node for node in graph.nodes if node.op == "output").args[0]
        position = {node: index for index, node in enumerate(self.nodes)}
        self.last_use = {node: max((position.get(user, len(self.nodes)) for user in node.users), default=-1)
                         for node in (self.input, *self.nodes)}
        # Each operand of an operation, so that an operation which takes a tensor twice counts twice.
        self._readers: dict[fx.Node, list[int]] = {node: [] for node in (self.input, *self.nodes)}
        for index, node in enumerate(self.nodes):
            fx.node.map_arg((node.args, node.kwargs), partial(self._note_reader, index))
        self._shared = [uses for uses in self._uses().values() if len(uses) > 1]

    def _check_hooks(self, model: nn.Module, graph: fx.Graph) -> None:
        """Raises Refused for hooks on modules whose inside stands in the graph, in the place of a call of them."""
        called = [str(node.target).split(".") for node in graph.nodes if node.op == "call_module"]
        above = {".".join(parts[:length]) for parts in called for length in range(1, len(parts))}
        for name in sorted(above):
            module = self.modules[name]
            changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            if module is not model and changed:
                raise Refused(f"Something else changes the forward pass of {name!r} ({type(module).__name__}), which a "
                              "memory budget passes by; use them in separate fits.")

    def run(self, start: int, stop: int, values: dict[fx.Node, Any]) -> None:
        """Compute some operations; results enter `values`, and leave it after the last operation that reads them."""
        for index in range(start, stop):
            node = self.nodes[index]
            given = fx.node.map_arg(node.args, lambda each: self._value(each, values))
            named = fx.node.map_arg(node.kwargs, lambda each: self._value(each, values))
            if node.op == "call_module":
                call = self.modules[str(node.target)]
            elif node.op == "call_method":
                call = getattr(given[0], str(node.target))
                given = given[1:]
            else:
                assert callable(node.target)
                call = node.target
            result = call(*given, **named)
            del given, named, call
            values[node] = result
            del result
            for each in (node, *node.all_input_nodes):
                if self.last_use.get(each, stop) <= index:
                    values.pop(each, None)

    def output(self, values: dict[fx.Node, Any]) -> Any:
        """The network's result, when everything has run."""
        return fx.node.map_arg(self.result, lambda each: self._value(each, values))

    def crossing(self, cut: int) -> list[fx.Node]:
        """Operations before a position (and the input) whose results are read at or behind it."""
        return [node for node in (self.input, *self.nodes[:cut]) if self.last_use[node] >= cut]

    def sound(self, start: int, stop: int) -> bool:
        """Whether computing operations again as one leaves the order in which gradients are added up.

        Sums of three in another order differ in the last bit. So of a tensor that is read behind the operations as
        well, they may hold one reader, and of a parameter that is used more than once all of its uses or none.
        """
        inside = range(start, stop)
        for node in self.crossing(start):
            readers = [index for index in self._readers[node] if index in inside]
            if len(readers) > 1 and self.last_use[node] >= stop:
                return False
        return not any(start <= use < stop and not (start <= uses[0] and uses[-1] < stop)
                       for uses in self._shared for use in uses)

    def _note_reader(self, index: int, node: fx.Node) -> None:
        self._readers.setdefault(node, []).append(index)

    def _uses(self) -> dict[int, list[int]]:
        """Parameter → positions of the operations that use it."""
        uses: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            used = [self._value(each, {}) for each in node.all_input_nodes if each.op == "get_attr"]
            if node.op == "call_module":
                used += self.modules[str(node.target)].parameters()
            for each in used:
                if isinstance(each, nn.Parameter):
                    uses.setdefault(id(each), []).append(index)
        return uses

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op != "get_attr":
            return values[node]
        # Fetched where it is read, so that a parameter's gradient finds the parameter also when computed again.
        found: Any = self.model
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found


class _Tracer(fx.Tracer):
    """Records what is done with buffers as well, which would otherwise happen once, while it is traced."""

    proxy_buffer_attributes = True


def _followed(model: nn.Module) -> fx.Graph:
    """The graph of a network.

    Raises:
        Refused: `torch.fx` cannot follow it, or a tensor is made in its forward pass, which would be one for all steps.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the network's own, or torch.fx's
        raise Refused(f"{type(model).__name__} cannot be traced ({first_line(error)}); a memory budget needs a network "
                      "whose forward pass does not depend on the data.") from None
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes if node.op == "get_attr"):
        raise Refused(f"{type(model).__name__} makes a tensor in its forward pass, which would be the same one in all "
                      "steps of a traced network; make it a buffer, or use MemoryReorder without a budget.")
    return graph


@dataclass
class Sizes:
    """What one forward pass of a batch makes, from shapes alone.

    Attributes:
        storages: operation → (key, bytes) of its result's storage; none for results that are no tensors.
        changed: positions at which an operation writes over an operand, each with the first position at which that
            operand's storage was there (-1: the input).
        cost: operation → its cost in bytes moved; a convolution's and linear layer's from its FLOPs, where those take
            longer.
    """

    storages: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    changed: list[tuple[int, int]] = field(default_factory=list)
    cost: dict[fx.Node, float] = field(default_factory=dict)


# A processor computes about this many FLOPs while it moves a byte: 10 on the two cores of the README's measurements;
# only the order in which layers are chosen depends on it.
FLOPS_PER_BYTE = 10.0


def examine(program: Program, x: Tensor) -> Sizes:
    """Sizes, costs and operands written over, of a program whose network is on the meta device.

    Args:
        x: a batch on the meta device.

    Raises:
        Refused: the forward pass fails there, or it changes a buffer other than a batch norm's statistics.
    """
    sizes, values = Sizes(), {program.input: x}
    since: dict[int, int] = {}
    alive = []
    norms = {id(buffer) for module in program.modules.values() if hasattr(module, "num_batches_tracked")
             for buffer in module.buffers(recurse=False)}
    buffers = [(name, buffer, buffer._version) for name, buffer in program.model.named_buffers()]
    sizes.storages[program.input] = _storage(x)
    since[sizes.storages[program.input][0]] = -1
    for index, node in enumerate(program.nodes):
        operands = [values[each] for each in node.all_input_nodes if each in values]
        operands = [each for each in operands if isinstance(each, Tensor)]
        versions = [each._version for each in operands]
        try:
            with torch.no_grad():
                program.run(index, index + 1, values)
        except Exception as error:  # torch's or the network's own
            raise Refused(f"{type(program.model).__name__} cannot run on shapes alone, as a memory budget needs "
                          f"({first_line(error)}); use MemoryReorder without a budget.") from error
        for operand, version in zip(operands, versions, strict=True):
            if operand._version != version:
                sizes.changed.append((index, since[_storage(operand)[0]]))
        result = values.get(node)
        moved = sum(each.nbytes for each in operands)
        if isinstance(result, Tensor):
            # Kept to the end, so that no storage takes another one's key.
            alive.append(result)
            sizes.storages[node] = _storage(result)
            since.setdefault(sizes.storages[node][0], index)
            moved += result.nbytes
        sizes.cost[node] = max(moved, _flops(program, node, result) / FLOPS_PER_BYTE)
    for name, buffer, version in buffers:
        if buffer._version != version and id(buffer) not in norms:
            raise Refused(f"{type(program.model).__name__} changes its buffer {name!r} in the forward pass, which a "
                          "memory budget would run twice; use MemoryReorder without a budget.")
    return sizes


def meta_copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimizer on the meta device; parameters that are shared stay shared."""
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for tensor in (*model.buffers(), *state):
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy((model, optimizer), memo)


def stretches(program: Program, sizes: Sizes) -> list[tuple[int, int]]:
    """The program cut where the least is alive: positions (start, stop) of stretches, one after the other.

    A place to cut has fewer bytes alive than those around it: behind a residual block or a pooling, say. No tensor
    that a later operation writes over may cross it.
    """
    forbidden = {cut for index, first in sizes.changed for cut in range(max(first + 1, 0), index + 1)}
    allowed = [cut for cut in range(1, len(program.nodes)) if cut not in forbidden]
    alive = {cut: _bytes(sizes, program.crossing(cut)) for cut in allowed}
    cuts = []
    # A cut is taken where bytes rise again behind it after they have fallen before it.
    falling = False
    for cut, following in pairwise(allowed):
        if alive[following] > alive[cut]:
            if falling:
                cuts.append(cut)
            falling = False
        elif alive[following] < alive[cut]:
            falling = True
    borders = [0, *cuts, len(program.nodes)]
    return list(pairwise(borders))


def _bytes(sizes: Sizes, nodes: Sequence[fx.Node]) -> int:
    return sum(dict(sizes.storages[node] for node in nodes if node in sizes.storages).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _flops(program: Program, node: fx.Node, result: Any) -> float:
    module = program.modules.get(str(node.target)) if node.op == "call_module" else None
    weight = getattr(module, "weight", None)
    if not isinstance(result, Tensor) or not isinstance(weight, Tensor) or weight.dim() < 2:
        return 0.0
    return 2.0 * result.numel() * weight[0].numel()


@dataclass(frozen=True)
class Schedule:
    """Which stretches of a network are computed again in backward.

    Attributes:
        operations: names of the program's operations, by which the network is known again.
        borders: (start, stop) of each stretch.
        groups: all stretches, in order.
    """

    operations: tuple[str, ...]
    borders: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]

    def fits(self, program: Program) -> bool:
        """Whether it was made for this program."""
        return self.operations == tuple(node.name for node in program.nodes)

    def state(self) -> dict[str, Any]:
        """Lists and numbers, for a checkpoint."""
        groups = [[each.first, each.last, each.again, sorted(each.dropped)] for each in self.groups]
        return {"operations": list(self.operations), "borders": [list(each) for each in self.borders],
                "groups": groups}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Schedule:
        """What `state` gave."""
        groups = tuple(Group(first, last, again, frozenset(dropped))
                       for first, last, again, dropped in state["groups"])
        return cls(tuple(state["operations"]), tuple((start, stop) for start, stop in state["borders"]), groups)


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
        results = _Again.apply(self, [None if isinstance(each, Tensor) else each for each in given], wanted, *tensors)
        del given, tensors
        values.update(zip(self.outputs, results, strict=True))
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
    def forward(ctx: Any, part: _Part, fixed: list[Any], wanted: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        ctx.part, ctx.fixed = part, fixed
        ctx.kept = [each.detach() for each in tensors]
        ctx.versions = [each._version for each in tensors]
        ctx.learning = ctx.needs_input_grad[3:]
        ctx.state = _State(tensors)
        with kept_through_replays(part.keepers) as ctx.results:
            return tuple(part.again(_filled(fixed, [each.detach() for each in tensors]), marking=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise gone()
        kept, ctx.kept = ctx.kept, None
        if [each._version for each in kept] != ctx.versions:
            raise RuntimeError("an activation needed for the gradient was modified in place after the forward pass; "
                               "memory-reorder, like PyTorch, cannot compute the gradient from it.")
        part, found = ctx.part, [None] * len(kept)
        results, ctx.results = ctx.results, None
        with torch.enable_grad(), ctx.state.restored(), still_statistics(part.called), \
                kept_through_replays(part.keepers, results):
            entered = []
            for index, learns in enumerate(ctx.learning):
                given, kept[index] = kept[index], None
                entered.append(_enter(given, found, index) if learns else given)
                del given
            again = part.again(_filled(ctx.fixed, entered), marking=False)
        del entered
        # Edges in the place of the results, so that what nobody else needs of these is free during backward.
        edges, given = [], []
        for result, gradient in zip(again, gradients, strict=True):
            if isinstance(result, Tensor) and result.requires_grad and gradient is not None:
                edges.append(get_gradient_edge(result))
                given.append(gradient)
        del again, gradients
        if edges:
            torch.autograd.backward(edges, given)
        return None, None, None, *found


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
