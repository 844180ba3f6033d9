"""A network as layers and activations, with their sizes, from shapes alone."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import Refused, first_line

PARAMETRIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_RELU = (nn.ReLU, torch.relu, torch.relu_, nn.functional.relu, "relu", "relu_")
_DROPOUT = (nn.Dropout, nn.Dropout2d, nn.functional.dropout)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.functional.max_pool2d, torch.max_pool2d)
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity, torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape,
          torch.permute, torch.transpose, operator.getitem, "flatten", "view", "reshape", "squeeze", "unsqueeze",
          "permute", "transpose", "contiguous", "expand")
# Their gradients need neither their operand nor their result, only shapes.
_LINEAR_MAPS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
                nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.functional.avg_pool2d, nn.functional.adaptive_avg_pool2d,
                nn.functional.pad, operator.add, operator.iadd, operator.sub, torch.add, torch.sub, torch.cat,
                torch.mean, torch.chunk, torch.split, "add", "add_", "mean", "sum", "chunk", "split")
# Their gradients need their operand and not their result (local response normalisation recomputes its scale).
_FROM_OPERAND = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Layer:
    """One step of the forward pass.

    Attributes:
        name: qualified module name, or the function's node name.
        kind: `conv`, `linear`, `relu`, `dropout`, `max-pool`, `linear-map`, `norm` or `other`.
        inputs: names of the activations it reads; in-place results carry their operand's name.
        output: name of the activation it writes.
        weight_bytes: of the parameters that it reads.
        weight_names: which those are; a layer called twice or sharing weights names them again.
        mask_bytes: what backward must know of the forward pass besides activations: one bit an element for ReLU and
            dropout, two bytes a result for max pooling (the winner's place, as the executor keeps it).
        reads_input, reads_output: whether backward needs these activations.
        in_place: writes over its operand, and its input gradient over its output gradient, element by element.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    weight_bytes: int
    weight_names: tuple[str, ...]
    mask_bytes: int
    reads_input: bool
    reads_output: bool
    in_place: bool


@dataclass(frozen=True)
class Network:
    """A traced network at one batch size.

    Attributes:
        layers: in the order of the forward pass.
        activations: name → bytes; the first is the network's input.
        weights: parameter name → bytes, each tensor once.
        result: the activation that the loss reads.
        batch_size: images.
    """

    layers: tuple[Layer, ...]
    activations: dict[str, int]
    weights: dict[str, int]
    result: str
    batch_size: int

    @property
    def input(self) -> str:
        """The input's name."""
        return next(iter(self.activations))


def symbolic(model: nn.Module) -> fx.GraphModule:
    """`torch.fx`'s graph of a network.

    Raises:
        Refused: its forward pass depends on the data, so that there is no one graph.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        raise Refused(
            f"{type(model).__name__} cannot be traced ({first_line(error)}); a plan needs a network "
            "whose forward pass does not depend on the data."
        ) from None


def trace(model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> Network:
    """What a network computes, layer by layer, with the sizes of everything, from shapes alone (meta device).

    ReLU and dropout run in place where nothing else reads their operand, as in Caffe's published networks; views and
    dropout in evaluation cost nothing.

    Args:
        model: any network that `torch.fx` can trace and that takes one batch of images and gives one tensor.
        input_shape: of one image, (channels, height, width).
        batch_size: images a step.

    Raises:
        Refused: untraceable, or it does not take these images.
    """
    network = copy.deepcopy(model).to("meta").train()
    graph = symbolic(network)
    shapes = _Shapes(graph)
    try:
        shapes.run(torch.empty(batch_size, *input_shape, device="meta"))
    except Exception as error:
        raise Refused(
            f"{type(model).__name__} does not take images of shape {input_shape} ({first_line(error)})."
        ) from None
    traced = _Traced(network, shapes)
    for node in graph.graph.nodes:
        traced.take(node)
    return Network(tuple(traced.layers), traced.activations, traced.weights, traced.result, batch_size)


class _Traced:
    """Layers and activations as far as a graph has been walked.

    Args:
        network: on the meta device.
        shapes: of every node's result.
    """

    def __init__(self, network: nn.Module, shapes: _Shapes) -> None:
        self.layers: list[Layer] = []
        self.activations: dict[str, int] = {}  # name → bytes
        self.result = ""
        self._network, self._shapes = network, shapes
        # A parameter that has several names goes by its first.
        self._parameters = dict(network.named_parameters(remove_duplicate=False))
        self._first: dict[nn.Parameter, str] = {}
        for name, parameter in self._parameters.items():
            self._first.setdefault(parameter, name)
        self.weights = {name: parameter.nbytes for parameter, name in self._first.items()}
        # Node → name of the activation that holds its result.
        self._alias: dict[fx.Node, str] = {}
        self._read_by_producer: set[str] = set()

    def take(self, node: fx.Node) -> None:
        """The next node of the graph.

        Raises:
            Refused: the network's result is not one tensor.
        """
        if node.op == "placeholder":
            self._alias[node] = "data"
            self.activations["data"] = self._shapes.bytes[node]
            return
        sources = [each for each in node.all_input_nodes if each in self._alias]
        if node.op == "output":
            if len(sources) != 1:
                raise Refused(f"{type(self._network).__name__} must give one tensor of logits for a plan.")
            self.result = self._alias[sources[0]]
            return
        if node not in self._shapes.bytes or not sources:
            return
        module = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind = _kind(node, module)
        if kind == "view":
            self._alias[node] = self._alias[sources[0]]
            return
        self._add(node, module, kind, sources)

    def _add(self, node: fx.Node, module: nn.Module | None, kind: str, sources: list[fx.Node]) -> None:
        inputs = tuple(dict.fromkeys(self._alias[each] for each in sources))
        in_place = self._in_place(kind, sources[0], inputs[0])
        name = str(node.target) if module is not None else node.name
        if any(layer.name == name for layer in self.layers):
            name = node.name
        output = inputs[0] if in_place else name
        elements = self._shapes.elements[node]
        masks = {"relu": -(-elements // 8), "dropout": -(-elements // 8), "max-pool": 2 * elements}
        used = self._weights_of(node, module)
        layer = Layer(
            name=name, kind=kind, inputs=inputs, output=output, weight_names=used,
            weight_bytes=sum(self.weights[each] for each in used), mask_bytes=masks.get(kind, 0),
            reads_input=kind in ("conv", "linear", "norm", "other"), reads_output=kind == "other", in_place=in_place,
        )
        if layer.reads_output:
            self._read_by_producer.add(output)
        self.layers.append(layer)
        self._alias[node] = output
        if not in_place:
            self.activations[output] = self._shapes.bytes[node]

    def _in_place(self, kind: str, source: fx.Node, operand: str) -> bool:
        """Whether a layer may write over its operand: nothing else reads that, backward of its producer included."""
        if kind not in ("relu", "dropout") or source.op == "placeholder" or operand == "data":
            return False
        return len(_readers(source)) == 1 and operand not in self._read_by_producer

    def _weights_of(self, node: fx.Node, module: nn.Module | None) -> tuple[str, ...]:
        """Names of the parameters that a layer reads: its module's, and those that the graph hands to it."""
        used = [self._first[parameter] for parameter in module.parameters()] if module is not None else []
        for each in node.all_input_nodes:
            if each.op == "get_attr" and str(each.target) in self._parameters:
                used.append(self._first[self._parameters[str(each.target)]])
        return tuple(dict.fromkeys(used))


def _readers(node: fx.Node) -> list[fx.Node]:
    """What computes with a node's result, views and size queries seen through."""
    found = []
    for user in node.users:
        if user.op == "call_function" and user.target is getattr:
            continue
        if user.op == "call_method" and user.target in ("size", "dim"):
            continue
        found.append(user)
    return found


class _Shapes(fx.Interpreter):
    """Runs a graph on the meta device and notes each tensor's size."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.bytes: dict[fx.Node, int] = {}
        self.elements: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        tensors = [value] if isinstance(value, Tensor) else [
            each for each in (value if isinstance(value, (tuple, list)) else ()) if isinstance(each, Tensor)]
        if tensors and n.op != "get_attr":
            self.bytes[n] = sum(each.numel() * each.element_size() for each in tensors)
            self.elements[n] = sum(each.numel() for each in tensors)
        return value


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    def among(known: Iterable[Any]) -> bool:
        if module is not None:
            return isinstance(module, tuple(each for each in known if isinstance(each, type)))
        return any(node.target is each or (isinstance(each, str) and node.op == "call_method" and node.target == each)
                   for each in known)

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, PARAMETRIC):
        return "conv"
    kinds = {"relu": _RELU, "dropout": _DROPOUT, "max-pool": _MAX_POOL, "view": _VIEWS, "linear-map": _LINEAR_MAPS,
             "norm": _FROM_OPERAND}
    return next((name for name, known in kinds.items() if among(known)), "other")
