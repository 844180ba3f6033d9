"""Networks whose structure changes: traced to a graph, edited, described in JSON, and built again from that.

A network is traced with torch.fx, so that a layer can be taken out wherever its author wrote the call. Its modules stay
the objects that they were, under their names.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import LayerlabError, Refused, first_line

_FORMAT = "layerlab-pruned-1"
_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
_RESIZED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _BatchNorm: ("num_features",),
}
_CUT = tuple(_RESIZED)


class Select(nn.Module):
    """Some channels of a tensor: (batch, channels, …) → (batch, len(index), …).

    Args:
        channels: of the input.
        index: which of them, in order.
    """

    def __init__(self, channels: int, index: list[int]) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("index", torch.tensor(index, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The selected channels, in the input's memory format."""
        if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # index_select alone would give another format, and every layer behind it would convert.
            return x.permute(0, 2, 3, 1).index_select(3, self.index).permute(0, 3, 1, 2)
        return x.index_select(1, self.index)


class Shift(nn.Module):
    """A constant a channel added to (batch, channels, height, width): what is left of a branch that is gone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return x + self.bias.view(1, -1, 1, 1)


class Sum(nn.Module):
    """The sum of two tensors, written over the first, which nothing else reads: a large one is not allocated anew."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(x, y) of any shapes that can be added → their sum."""
        alike = x.shape == y.shape and x.dtype == y.dtype
        return x.add_(y) if alike else x + y


FRESH = (nn.Conv2d, nn.Linear, _BatchNorm, Shift, Select, Sum)
"""Layers whose output is a tensor of its own, over which its only reader may write."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A module without children may decide what it does by its mode; inside the graph it goes on doing so.
        return super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None


def trace(network: nn.Module) -> fx.GraphModule:
    """A network as a graph of its modules, which can be edited; the modules are the network's own.

    Operations that work in place are replaced by those that do not, since a tensor may get other readers; activations
    that nothing else reads before work in place again, as their author had it.

    Raises:
        Refused: it cannot be traced, calls a layer with weights twice, ties two layers' weights, or has dropout that is
            no module; with the reason.
    """
    if isinstance(network, fx.GraphModule) and "edits" in network.meta:
        return network
    name = type(network).__name__
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise Refused(
            f"{name} cannot be pruned: its forward pass cannot be traced ({first_line(error)}); write what "
            "depends on the data as a module without children."
        ) from None
    _refuse_ties(network)
    seen: set[str] = set()
    in_place: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if getattr(module, "inplace", False):
                in_place.add(str(node.target))
            if next(module.parameters(), None) is not None:
                if node.target in seen:
                    raise Refused(f"{name} cannot be pruned: its layer {node.target} is called twice, and a channel "
                                  "that is dead in one call may live in the other; give each call a layer of its own.")
                seen.add(str(node.target))
        elif node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
            if "dropout" in getattr(node.target, "__name__", ""):
                raise Refused(f"{name} cannot be pruned: it calls {node.target.__name__} as a function, whose "
                                    "mode a traced network cannot change; use nn.Dropout.")
    traced = fx.GraphModule(network, graph, name)
    traced.train(network.training)
    traced.meta["edits"] = []
    traced.meta["name"] = name
    traced.meta["frozen"] = [path for path, module in network.named_modules()
                             if any(not each.requires_grad for each in module.parameters(recurse=False))]
    traced.meta["original"] = _shapes(traced)
    traced.meta["in_place"] = sorted(in_place)
    _work_in_place(traced)
    return traced


def _refuse_ties(network: nn.Module) -> None:
    """Refuse layers that share a parameter: cutting one of them would leave the other with a parameter of its own."""
    owner: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for path, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            first, other = owner.setdefault(parameter, (path, module))
            if other is not module and (isinstance(module, _CUT) or isinstance(other, _CUT)):
                raise Refused(f"{type(network).__name__} cannot be pruned: its layers {first} and {path} share a "
                              "parameter, which removing channels would part; give each its own.")


def frozen_by_user(network: fx.GraphModule) -> set[nn.Module]:
    """The layers that were frozen when the network was traced, which keep their shape and their weights."""
    frozen = network.meta["frozen"]
    # Asked for at many a node, and nearly always empty.
    return {module for path, module in network.named_modules() if path in frozen} if frozen else set()


def name_of(network: nn.Module) -> str:
    """The class of a network, or of the one that it was traced from."""
    return str(getattr(network, "meta", {}).get("name") or type(network).__name__)


def structure(network: fx.GraphModule) -> dict[str, Any]:
    """What tells a network that was pruned from the one that it was traced from, as JSON values.

    Returns:
        `format`; `edits`, in order: what was taken out of the graph and put into it; `modules`: the attributes of
        every layer that has changed its shape. With the network's `state_dict` it is all that `rebuild` needs.

    Raises:
        LayerlabError: it is no traced network, or one that was folded.
    """
    if "edits" not in getattr(network, "meta", {}):
        raise LayerlabError(f"{name_of(network)} has no structure to keep: only what pruning or `trace` returns has "
                            "one. Keep the structure of the pruned network, and fold that after `rebuild`.")
    original = network.meta["original"]
    changed = {path: shape for path, shape in _shapes(network).items() if original.get(path) != shape}
    return {"format": _FORMAT, "edits": copy.deepcopy(network.meta["edits"]), "modules": changed}


def rebuild(network: nn.Module, described: Mapping[str, Any]) -> fx.GraphModule:
    """Build a pruned network again; load its `state_dict` into it afterwards.

    Args:
        network: the one that was pruned, new and unpruned, from its own builder; its modules are taken over.
        described: what `structure` gave.

    Returns:
        The network with the pruned shapes, its weights undefined where the shape changed.

    Raises:
        LayerlabError: the description is of another format or network.
    """
    if described.get("format") != _FORMAT:
        raise LayerlabError(f"This is no structure of a pruned network: its format is {described.get('format')!r}, not "
                            f"{_FORMAT!r}.")
    traced = trace(network)
    try:
        for kind, *arguments in described["edits"]:
            edit(traced, kind, *arguments)
        for path, shape in described["modules"].items():
            _resize(traced, path, shape)
    except (KeyError, AttributeError) as error:
        raise LayerlabError(f"This structure does not belong to {type(network).__name__}: it has no {error}.") from None
    clean(traced)
    return traced


def edit(network: fx.GraphModule, kind: str, *arguments: Any) -> None:
    """Change the graph and note it: one of `_EDITS`, whose first argument is the name of a node."""
    _EDITS[kind](network, *arguments)
    network.meta["edits"].append([kind, *arguments])


def clean(network: fx.GraphModule) -> None:
    """Remove what the graph no longer reaches, and make the forward pass anew."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.graph.lint()
    _work_in_place(network)
    network.recompile()


def _work_in_place(network: fx.GraphModule) -> None:
    """Let an activation overwrite its input where its author had it so and nobody else reads that: at batch sizes whose
    tensors leave the cache, getting new memory takes longer than the arithmetic."""
    for path in network.meta["in_place"]:
        calls = [each for each in network.graph.nodes if each.op == "call_module" and each.target == path]
        for module in {layer(network, call) for call in calls}:
            module.inplace = all(
                len(source(call).users) == 1
                and (isinstance(layer(network, source(call)), FRESH) or source(call).target is operator.add)
                for call in calls
            )


def node(network: fx.GraphModule, name: str) -> fx.Node:
    """A node of the graph by name.

    Raises:
        KeyError: there is none.
    """
    for each in network.graph.nodes:
        if each.name == name:
            return each
    raise KeyError(name)


def layer(network: fx.GraphModule, at: Any) -> nn.Module | None:
    """The module that a node calls, or None."""
    return network.get_submodule(str(at.target)) if isinstance(at, fx.Node) and at.op == "call_module" else None


def source(at: fx.Node) -> fx.Node:
    """The node that a module's node reads."""
    return cast(fx.Node, at.args[0])


def _bypass(network: fx.GraphModule, name: str, by: str) -> None:
    """What reads node `name` reads `by` instead."""
    node(network, name).replace_all_uses_with(node(network, by))


def _uncat(network: fx.GraphModule, name: str, gone: str) -> None:
    """A concatenation loses one of its inputs."""
    cat, lost = node(network, name), node(network, gone)
    cat.args = ([each for each in cat.args[0] if each is not lost], *cat.args[1:])


def _select(network: fx.GraphModule, name: str) -> None:
    """A selection of channels, all of them so far, in front of a batch norm."""
    norm = node(network, name)
    module = layer(network, norm)
    path = f"{norm.target}_select"
    chooser = Select(module.num_features, list(range(module.num_features)))
    network.add_submodule(path, chooser.to(module.weight.device))
    with network.graph.inserting_before(norm):
        chosen = network.graph.call_module(path, (source(norm),))
    norm.args = (chosen,)


def _shift(network: fx.GraphModule, name: str, channels: int) -> None:
    """A constant a channel added behind a node."""
    at = node(network, name)
    path = f"{name}_shift"
    network.add_submodule(path, Shift(channels).to(next(network.parameters()).device))
    readers = list(at.users)
    with network.graph.inserting_after(at):
        moved = network.graph.call_module(path, (at,))
    for reader in readers:
        reader.replace_input_with(at, moved)


def forget_selections(network: fx.GraphModule) -> None:
    """Take out the selections that select everything."""
    for each in list(network.graph.nodes):
        chooser = layer(network, each)
        if isinstance(chooser, Select) and chooser.index.tolist() == list(range(chooser.channels)):
            (norm,) = each.users
            each.replace_all_uses_with(source(each))
            network.meta["edits"].remove(["select", norm.name])


_EDITS = {"bypass": _bypass, "uncat": _uncat, "select": _select, "shift": _shift}


def _shapes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Path → attributes of every layer whose shape pruning may change."""
    shapes: dict[str, dict[str, Any]] = {}
    for path, module in network.named_modules():
        if isinstance(module, Select):
            shapes[path] = {"channels": module.channels, "index": module.index.tolist()}
        elif isinstance(module, Shift):
            shapes[path] = {"channels": len(module.bias)}
        for kind, attributes in _RESIZED.items():
            if isinstance(module, kind):
                shapes[path] = {name: list(value) if isinstance(value := getattr(module, name), tuple) else value
                                for name in attributes}
                if not isinstance(module, _BatchNorm):
                    shapes[path]["bias"] = module.bias is not None
    return shapes


def _resize(network: nn.Module, path: str, shape: Mapping[str, Any]) -> None:
    """Give a layer the attributes and parameters of a shape, where it is."""
    module = network.get_submodule(path)
    if isinstance(module, Select):
        module.channels = shape["channels"]
        module.index = torch.tensor(shape["index"], device=module.index.device)
        return
    if isinstance(module, Shift):
        module.bias = _empty(module.bias, (shape["channels"],))
        return
    bias = shape.get("bias", True)
    for name, value in shape.items():
        if name != "bias":
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    if isinstance(module, _BatchNorm):
        size: tuple[int, ...] = (module.num_features,)
        module.running_mean, module.running_var = (
            None if each is None else each.new_zeros(size) for each in (module.running_mean, module.running_var))
        if module.affine:
            module.weight, module.bias = _empty(module.weight, size), _empty(module.bias, size)
        return
    if isinstance(module, nn.Conv2d):
        size = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    else:
        size = (module.out_features, module.in_features)  # type: ignore[assignment]  # two integers
    module.weight = _empty(module.weight, size)
    module.bias = _empty(module.weight, size[:1]) if bias else None  # type: ignore[assignment]  # None is one, too


def _empty(like: Tensor, size: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(like.detach().new_zeros(size), requires_grad=like.requires_grad)
