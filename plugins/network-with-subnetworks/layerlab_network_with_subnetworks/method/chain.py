"""Networks as chains of layers, and what is left of one when layers are taken off."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from layerlab import Refused

NAME = "network-with-subnetworks"
DropoutBy = Literal["position", "layer"]
# Without the batch; what cannot be known from weights alone stands there by name.
Shape = tuple[int | str, ...]
NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# These change the shape between layers, so they belong to none and stay when a layer goes.
RESHAPING = (nn.Flatten, nn.Unflatten, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """One layer of a chain.

    Attributes:
        name: of the child that has the parameters.
        children: names of all children that go with it: itself, then its normalisation, activation, dropout.
    """

    name: str
    children: tuple[str, ...]


def children_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a network as it calls them: (name, module), one used several times under each of its names.

    `named_children` gives each module once, so that a chain built from it would lack the repetitions.
    """
    everything = network.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in everything if name and "." not in name]


def layers_of(network: nn.Module) -> list[Layer]:
    """The layers of a chain, input first.

    Raises:
        Refused: the network is no plain `nn.Sequential`, or has batch norms whose statistics would be shared.
    """
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        raise Refused(
            f"{NAME} needs a chain of layers, an nn.Sequential, and {type(network).__name__} is none; wrap the parts "
            "of the network in one nn.Sequential."
        )
    for name, module in network.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            raise Refused(
                f"{NAME} cannot train {name!r}: the base and its sub-networks would share one batch norm's running "
                "statistics though their activations differ; use nn.GroupNorm."
            )
    layers: list[list[str]] = []
    for name, child in children_of(network):
        if isinstance(child, RESHAPING):
            continue
        if next(child.parameters(), None) is not None and not isinstance(child, NORMALISATION):
            layers.append([name])
        elif layers:
            layers[-1].append(name)
    return [Layer(children[0], tuple(children)) for children in layers]


def check_detachable(network: nn.Sequential, names: Collection[str], example: Tensor | None = None) -> None:
    """Refuse to take layers off a chain whose remaining layers do not fit together.

    Args:
        network: the chain.
        names: of the layers to take off.
        example: images as the network takes them. Without them the widths of linear and convolution layers are
            compared instead of the shapes that really pass.

    Raises:
        Refused: an unknown layer, the last one, or shapes that do not match, naming both layers and shapes.
    """
    layers = layers_of(network)
    known = [layer.name for layer in layers]
    for name in names:
        if name not in known:
            raise Refused(f"{NAME}: the network has no layer {name!r}; it has {', '.join(known)}.")
    if known and known[-1] in names:
        raise Refused(f"{NAME} cannot detach {known[-1]!r}: it is the network's last layer; keep it.")
    gone = {child for layer in layers if layer.name in names for child in layer.children}
    taken = _shapes(network, example) if example is not None else _widths(network)
    before: tuple[str, Shape] | None = None
    for name, child in children_of(network):
        if name in names:
            before = before or (name, taken.get(name, ()))
        elif before and name not in gone and name in taken and not (example is None and isinstance(child, RESHAPING)):
            # Widths of a convolution and of a linear layer cannot be compared without knowing the pixels between.
            comparable = example is not None or len(taken[name]) == len(before[1])
            if comparable and taken[name] != before[1]:
                after, wants = name, taken[name]
                # An nn.Flatten, say, takes anything: the layer behind it is the one to name.
                if isinstance(child, RESHAPING):
                    later = known[[known.index(layer) for layer in known if layer in names][-1] + 1 :]
                    after = next((layer for layer in later if layer not in names), name)
                fitting = _fitting(network, layers, taken)
                remedy = f"layers={fitting!r} can be detached" if fitting else "make them equally wide"
                raise Refused(
                    f"{NAME} cannot detach {before[0]!r}: it takes shape {_text(before[1])}, and the next layer left, "
                    f"{after!r}, is given {_text(wants)}; {remedy}."
                )
            before = None


def _text(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _shapes(network: nn.Sequential, example: Tensor) -> dict[str, Shape]:
    """The shape, without the batch, that each child is given."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    shapes: dict[str, Shape] = {}
    x = example[:2]
    with torch.no_grad():
        for name, child in children_of(network):
            shapes[name] = tuple(x.shape[1:])
            x = child(x)
    for module, mode in modes.items():
        module.training = mode
    return shapes


def _widths(network: nn.Sequential) -> dict[str, Shape]:
    """What each child with a linear or convolution layer takes, as far as its weights say."""
    widths: dict[str, Shape] = {}
    for name, child in children_of(network):
        first = next((module for module in child.modules() if isinstance(module, WEIGHTED)), None)
        if isinstance(first, nn.Linear):
            widths[name] = (first.in_features,)
        elif first is not None:
            widths[name] = (first.in_channels, *("depth", "height", "width")[-len(first.kernel_size):])
    return widths


def detachable(network: nn.Sequential, example: Tensor) -> list[str]:
    """The layers that leave their input's shape as it is, input first; the last one stays in any case.

    Args:
        network: the chain.
        example: images as the network takes them, (batch, channels, height, width).

    Example:
        >>> from layerlab_network_with_subnetworks import convolutional_chain
        >>> detachable(convolutional_chain(depth=2), torch.rand(2, 3, 32, 32))  # the stem halves the image
        ['block1', 'block2']
    """
    return _fitting(network, layers_of(network), _shapes(network, example))


def _fitting(network: nn.Sequential, layers: Sequence[Layer], taken: dict[str, Shape]) -> list[str]:
    names = [name for name, _ in children_of(network)]
    fitting = []
    for layer in layers[:-1]:
        last = names.index(layer.children[-1])
        if layer.name in taken and taken.get(names[last + 1]) == taken[layer.name]:
            fitting.append(layer.name)
    return fitting


def without(network: nn.Sequential, names: Collection[str], dropout_by: DropoutBy = "position") -> nn.Sequential:
    """The chain without some layers, made of the *same* modules, so that it shares every parameter.

    Args:
        network: the chain.
        names: of the layers that are left out; their activation, dropout and normalisation go with them.
        dropout_by: `position`: the i-th layer left drops at the rate of the chain's i-th layer; `layer`: at its own.

    Returns:
        A chain whose children keep their names. It predicts as the full one would without these layers.
    """
    layers = layers_of(network)
    children = dict(children_of(network))
    gone = {child for layer in layers if layer.name in names for child in layer.children}
    left = OrderedDict((name, child) for name, child in children.items() if name not in gone)
    if dropout_by == "position":
        kept = [layer for layer in layers if layer.name not in names]
        for place, layer in zip(layers, kept, strict=False):
            there, here = ([name for name in part.children if isinstance(children[name], _DropoutNd)]
                           for part in (place, layer))
            if len(there) != len(here):
                continue
            for model, name in zip(there, here, strict=True):
                rate = children[model].p
                if children[name].p != rate:
                    left[name] = copy.deepcopy(children[name])
                    left[name].p = rate
    return nn.Sequential(left)


def detach(
    model: nn.Module, layers: int | str | Sequence[str] = 1, *, example: Tensor | None = None,
    dropout_by: DropoutBy = "position",
) -> nn.Sequential:
    """A plain network of its own: the chain without some layers, one or several at a time (Sections 3.1 and 5).

    Args:
        model: a chain that `NetworkWithSubnetworks` trained; it is copied, not changed.
        layers: how many, from the input on, or their names.
        example: images as the network takes them, (batch, channels, height, width); with it, shapes are checked where
            they pass. Without it, by the first linear or convolution layer that each block declares.
        dropout_by: as in `without`; matters only if the network is trained on.

    Returns:
        A network in evaluation mode that predicts what the sub-network did in training.

    Raises:
        Refused: the model is no chain, or the layers left do not fit together, naming both and their shapes.
    """
    chain = layers_of(model)
    assert isinstance(model, nn.Sequential)
    if isinstance(layers, int):
        if not 0 <= layers < len(chain):
            raise Refused(f"{NAME} can detach 0 to {len(chain) - 1} of these {len(chain)} layers, got {layers}.")
        names = [layer.name for layer in chain[:layers]]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
    check_detachable(model, names, example)
    return copy.deepcopy(without(model, names, dropout_by)).eval()
