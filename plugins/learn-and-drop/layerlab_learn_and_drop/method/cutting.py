"""Where a network can be cut in two, what each cut costs, and the two parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerlab import NORMALISATION, Refused, first_line


@dataclass(frozen=True)
class Layer:
    """What gets its own scores: a module with parameters that is no normalisation.

    Attributes:
        name: qualified, in the network.
        parameters: qualified names of its own parameters, without the normalisation's.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A place between two layers where the network can be parted.

    Attributes:
        layers: how many layers lie before it, in forward order.
        node: name of the last operation before it.
        shapes: of the tensors that cross it, without the batch's dimension.
        elements: how many numbers cross it for one image.
        flops: of the part before it in one image's forward pass.
        modules: qualified names of the modules before it.
    """

    layers: int
    node: str
    shapes: tuple[tuple[int, ...], ...]
    elements: int
    flops: float
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A network's layers in forward order and its cuts.

    Attributes:
        layers: in forward order.
        cuts: number of layers before the cut → cut; where nothing but tensors of the batch can cross there is none.
        flops: of one image's forward pass through the whole network.
    """

    layers: tuple[Layer, ...]
    cuts: dict[int, Cut]
    flops: float


class _Tracer(fx.Tracer):
    """Modules without children are leaves too, whoever wrote them: what they do may depend on the mode."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None


@contextmanager
def mode(network: nn.Module, training: bool) -> Iterator[None]:
    """The network in training or in inference mode, and afterwards each module as it was."""
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace(network: nn.Module, training: bool) -> fx.GraphModule:
    """The network as a graph whose modules are the network's own, compiled or not.

    Raises:
        Refused: torch.fx cannot trace it.
    """
    with mode(network, training), _eager(network):
        tracer = _Tracer()
        try:
            graph = tracer.trace(network)
        except Exception as error:  # whatever the network's own code raises when it meets a proxy
            raise Refused(
                f"learn-and-drop cuts a network along its torch.fx graph, and {type(network).__name__} cannot be "
                f"traced ({first_line(error)}); take control flow that depends on "
                "values out of its forward, or into a module without children."
            ) from None
        return fx.GraphModule(tracer.root, graph)


@contextmanager
def refusing(network: nn.Module) -> Iterator[None]:
    """Whatever the network's own code or torch.fx raises in the block becomes a refusal in one sentence."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"learn-and-drop cannot cut {type(network).__name__}: the first try ends in {type(error).__name__} "
            f"({first_line(error)}); use another network."
        ) from None


@contextmanager
def _eager(network: nn.Module) -> Iterator[None]:
    """Every module as if it were not compiled, which torch.fx cannot trace; afterwards as it was."""
    compiled = {module: module._compiled_call_impl for module in network.modules()}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


class _Sizes(fx.Interpreter):
    """Runs a graph and notes each operation's result's shape and the FLOPs counted so far."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.traced = graph
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}
        self.flops: dict[fx.Node, int] = {}
        self.counter = FlopCounterMode(display=False)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.shapes[n] = tuple(result.shape) if isinstance(result, Tensor) else None
        self.flops[n] = self.counter.get_total_flops()
        return result


def make_plan(network: nn.Module, example: Tensor) -> Plan:
    """Find the layers and the cuts.

    Between two layers the place is taken where the fewest numbers cross, the last of several, so that normalisation,
    activation and pooling lie on the side where they leave less to store. Nothing but tensors with
    the batch as first dimension may cross (so not the image itself, and no shape computed from it), and no parameter
    or buffer may be used on both sides.

    Args:
        network: any that torch.fx can trace; its modes are left as they were.
        example: images as it takes them; the first is used.

    Raises:
        Refused: it cannot be traced, runs other operations in training than in inference, has a single layer or no
            place for a cut.
    """
    with refusing(network):
        return _plan(network, example)


def _plan(network: nn.Module, example: Tensor) -> Plan:
    sizes = _measured(network, example)
    _check_modes(network, sizes[0].traced)
    # Parameters that are read as attributes belong to the module that uses them, and go to its side of a cut.
    nodes = [node for node in sizes[0].traced.graph.nodes if node.op != "get_attr"]
    layers, ends = _layers(network, nodes)
    if len(layers) < 2:
        raise Refused(
            f"learn-and-drop needs a network of two layers or more, and {type(network).__name__} has {len(layers)}; "
            "use another network."
        )
    calls = {str(node.target): place for place, node in reversed(list(enumerate(nodes))) if node.op == "call_module"}
    shared = _used_on_both_sides(network, nodes)
    places = {node: place for place, node in enumerate(nodes)}
    last_use = [max((places[user] for user in node.users), default=-1) for node in nodes]
    learns = _learns_behind(network, nodes)
    crossing = _crossing(nodes, last_use)
    # The modules in the order of their first calls, and at each place how many of them there are up to it.
    names = sorted(calls, key=calls.__getitem__)
    known = list(itertools.accumulate(calls.get(str(node.target)) == place for place, node in enumerate(nodes)))
    cuts: dict[int, Cut] = {}
    for count in range(1, len(layers)):
        best: Cut | None = None
        behind = False
        for place in range(ends[count - 1], calls[layers[count].name]):
            before = names[: known[place]]
            cut = None if shared[place] else _cut(nodes[place], crossing[place], before, count, sizes)
            if cut is not None and (best is None or cut.elements <= best.elements):
                best, behind = cut, learns[place]
        if best is not None and behind:
            cuts[count] = best
    if not cuts:
        raise Refused(
            f"learn-and-drop finds no place to cut {type(network).__name__}: behind each layer nothing learns, or the "
            "image, a parameter or something without a row for each image is used on both sides; use another network."
        )
    return Plan(tuple(layers), cuts, sizes[0].flops[nodes[-1]] / 2)


def _measured(network: nn.Module, example: Tensor) -> tuple[_Sizes, _Sizes]:
    """The network's graph run with two and with three images.

    Two sizes of a batch tell which tensors have the batch as their first dimension.
    """
    traced = trace(network, training=False)
    with mode(network, training=False):
        first, second = _Sizes(traced), _Sizes(traced)
        with torch.no_grad(), first.counter:
            first.run(example[:1].expand(2, *example.shape[1:]))
        with torch.no_grad():
            second.run(example[:1].expand(3, *example.shape[1:]))
    return first, second


def _check_modes(network: nn.Module, inference: fx.GraphModule) -> None:
    """Refuse a network that runs other operations in training than its graph for inference has."""
    graphs = inference.graph, trace(network, training=True).graph
    operations = [[(node.op, str(node.target), node.name) for node in graph.nodes] for graph in graphs]
    if operations[0] != operations[1]:
        raise Refused(
            f"learn-and-drop cannot cut {type(network).__name__}: it runs other operations in training than in "
            "inference; use a network without such branches, or move them into a module without children."
        )


def _layers(network: nn.Module, nodes: Sequence[fx.Node]) -> tuple[list[Layer], list[int]]:
    """The layers in forward order with the names of their parameters, and the place where each one's work ends."""
    layers: list[tuple[str, list[str]]] = []
    ends: list[int] = []
    seen: set[str] = set()
    early: list[str] = []  # parameters used before the first layer
    for place, node in enumerate(nodes):
        used = _parameters(network, node)
        if not used:
            continue
        if node.op != "call_module":
            (layers[-1][1] if layers else early).extend(used)
            ends[-1:] = [place] * len(layers[-1:])
            continue
        if node.target not in seen and not isinstance(network.get_submodule(str(node.target)), NORMALISATION):
            seen.add(str(node.target))
            layers.append((str(node.target), [*early, *used]))
            ends.append(place)
            early = []
    return [Layer(name, tuple(names)) for name, names in layers], ends


def _learns_behind(network: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each place: whether a parameter learns that no module up to there has."""
    left = {parameter for parameter in network.parameters() if parameter.requires_grad}
    found = []
    for node in nodes:
        if node.op == "call_module":
            left.difference_update(network.get_submodule(str(node.target)).parameters())
        found.append(bool(left))
    return found


def _crossing(nodes: Sequence[fx.Node], last_use: Sequence[int]) -> list[list[fx.Node]]:
    """For each place: the nodes up to there whose result is used behind it, in their order."""
    found: list[list[fx.Node]] = []
    alive: list[tuple[fx.Node, int]] = []
    for place, (node, last) in enumerate(zip(nodes, last_use, strict=True)):
        alive = [(each, until) for each, until in (*alive, (node, last)) if until > place]
        found.append([each for each, _ in alive])
    return found


def _used_on_both_sides(network: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each place: whether a parameter or a buffer is used before or at it, and after it too."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, node in enumerate(nodes):
        tensors: list[Tensor] = list(_parameters(network, node).values())
        if node.op == "call_module":
            tensors += network.get_submodule(str(node.target)).buffers()
        for tensor in tensors:
            first.setdefault(id(tensor), place)
            last[id(tensor)] = place
    both = [False] * len(nodes)
    for tensor_id, begin in first.items():
        for place in range(begin, last[tensor_id]):
            both[place] = True
    return both


def _cut(
    node: fx.Node, crossing: Sequence[fx.Node], modules: Sequence[str], count: int, sizes: tuple[_Sizes, _Sizes]
) -> Cut | None:
    """The cut behind a node, which has `count` layers and these modules before it; None where more than tensors of the
    batch cross."""
    shapes = [_example_shape(each, *sizes) for each in crossing if each.op != "placeholder"]
    known = tuple(shape for shape in shapes if shape is not None)
    if len(known) < len(crossing):
        return None
    elements = sum(torch.Size(shape).numel() for shape in known)
    return Cut(count, node.name, known, elements, sizes[0].flops[node] / 2, tuple(modules))


def _parameters(network: nn.Module, node: fx.Node) -> dict[str, nn.Parameter]:
    """The parameters that an operation uses, its own and those it is given, by qualified name."""
    found: dict[str, nn.Parameter] = {}
    for given in node.all_input_nodes:
        if given.op == "get_attr":
            owner, _, leaf = str(given.target).rpartition(".")
            value = getattr(network.get_submodule(owner), leaf)
            if isinstance(value, nn.Parameter):
                found[str(given.target)] = value
    if node.op == "call_module":
        inner = network.get_submodule(str(node.target)).named_parameters()
        found |= {f"{node.target}.{name}": parameter for name, parameter in inner}
    return found


def _example_shape(node: fx.Node, first: _Sizes, second: _Sizes) -> tuple[int, ...] | None:
    """The shape without the batch's dimension, which has to be the first; None for anything else."""
    a, b = first.shapes[node], second.shapes[node]
    return a[1:] if a and b and (a[0], b[0]) == (2, 3) and a[1:] == b[1:] else None


def split(network: nn.Module, cut: Cut, training: bool = True) -> tuple[nn.Module, nn.Module]:
    """The part before a cut, for inference, and the part after it, for training or for inference too.

    Both share the network's modules, and one without parameters may be in both: so the prefix is put in inference mode
    for as long as it runs. What the network does in training may differ from what it does in inference, so each part
    comes from a trace of its own.

    Returns:
        prefix: images → the tensors that cross the cut, one or a tuple.
        tail: what the prefix gives → logits.

    Raises:
        Refused: torch.fx cannot trace the network.
    """
    parts = []
    for traced in (trace(network, training=False), trace(network, training)):
        names = [node.name for node in traced.graph.nodes]
        place = {name: index for index, name in enumerate(names)}
        edge = place[cut.node]
        parts.append(split_module(traced, network, partial(_part, place, edge)))
    return _prefix(parts[0]), _tail(parts[1])


def _part(place: Mapping[str, int], edge: int, node: fx.Node) -> int:
    return int(place[node.name] > edge)


def _prefix(parted: fx.GraphModule) -> fx.GraphModule:
    """Of the module that `split_module` made, what comes before the second part's call."""
    (call,) = [node for node in parted.graph.nodes if node.op == "call_module" and node.target == "submod_0"]
    (output,) = [node for node in parted.graph.nodes if node.op == "output"]
    output.args = (call,)
    return _clean(parted)


def _tail(parted: fx.GraphModule) -> fx.GraphModule:
    """Of the module that `split_module` made, what comes after the first part's call."""
    graph = parted.graph
    (call,) = [node for node in graph.nodes if node.op == "call_module" and node.target == "submod_0"]
    (images,) = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(images):
        features = graph.placeholder("features")
    call.replace_all_uses_with(features)
    graph.erase_node(call)
    graph.erase_node(images)
    return _clean(parted)


def _clean(parted: fx.GraphModule) -> fx.GraphModule:
    parted.graph.eliminate_dead_code()
    # A new one takes only what the graph still uses.
    return fx.GraphModule(parted, parted.graph)


def check_cut(network: nn.Module, cut: Cut, example: Tensor) -> None:
    """Check that a network cut in two computes what the whole does.

    Raises:
        Refused: it cannot be cut there, or the parts compute something else.
    """
    with refusing(network):
        prefix, tail = split(network, cut, training=False)
        with torch.no_grad(), mode(network, training=False), _eager(network):
            whole, parted = network(example), tail(prefix(example))
    # Relative to the largest logit: the parts may run their operations in other memory formats.
    if not torch.allclose(whole, parted, rtol=1e-4, atol=1e-5 * float(whole.abs().max())):
        raise Refused(
            f"learn-and-drop cannot cut {type(network).__name__}: cut behind {cut.layers} layers it gives other "
            "outputs than whole; use a network that draws nothing at random in inference and keeps no state."
        )


def features_of(values: object) -> tuple[Tensor, ...]:
    """What a prefix gives, as a tuple."""
    return tuple(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
