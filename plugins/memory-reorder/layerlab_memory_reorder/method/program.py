"""A network's forward pass as a list of operations, and where it can be cut into stretches."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerlab import Refused, first_line
from layerlab_memory_reorder.method.parts import sole_owner


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
            if self._adds_in_place(index, start, given):
                call = operator.iadd
            result = call(*given, **named)
            del given, named, call
            values[node] = result
            del result
            for each in (node, *node.all_input_nodes):
                if self.last_use.get(each, stop) <= index:
                    values.pop(each, None)

    def _adds_in_place(self, index: int, start: int, given: Any) -> bool:
        """Whether an addition may write its sum over its first operand, as `y += x` does, which fx follows as `y + x`.

        The operand comes from one of the operations from `start` on, and nothing reads or holds it any more.
        """
        node = self.nodes[index]
        if node.op != "call_function" or node.target is not operator.add or len(node.all_input_nodes) != 2:
            return False
        first = node.all_input_nodes[0]
        made = self.nodes[start:index]
        a, b = given
        if first not in made or self.last_use[first] != index or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        hooks = self.modules[str(first.target)]._forward_hooks if first.op == "call_module" else None
        alike = a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        return alike and not hooks and not a._is_view() and sole_owner(a)

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
