"""Layers in the order in which they run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from layerlab.base.arguments import validated
from layerlab.base.trees import on_tensors, predict

# The kinds of layers that normalise; each belongs to the layer that runs before it.
NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Modules with parameters of their own, among which are those behind their parametrizations (weight norm, say)."""
    hidden: set[nn.Module] = set()
    found = []
    for module in model.modules():
        parametrized = parametrize.is_parametrized(module)
        if parametrized:
            hidden.update(module.parametrizations.modules())  # type: ignore[union-attr]  # not in torch's stubs
        if parametrized or next(module.parameters(recurse=False), None) is not None:
            found.append(module)
    return [module for module in found if module not in hidden]


@validated
def forward_order(model: nn.Module, example: Any) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own in the order in which the forward pass reaches them.

    It is run once, eagerly, in evaluation mode; the order of declaration does not matter. A module that is called
    several times stands where its last call is, since what precedes that call can only be left out of backward with it;
    so do modules that share a weight.
    A module with both parameters and children (a transformer's class token) stands where its call ends.

    Args:
        model: any network.
        example: a batch's inputs as the network takes them, images say; the first two are used.

    Returns:
        (qualified name, module) pairs. Modules that the forward pass does not reach are left out.

    Example:
        >>> import torch
        >>> from layerlab import forward_order
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> [name for name, _ in forward_order(network, torch.zeros(1, 4))]
        ['0', '2']
    """
    calls: dict[nn.Module, int] = {}
    clock = itertools.count()
    handles = [
        module.register_forward_hook(lambda module, *_: calls.__setitem__(module, next(clock)))
        for module in _layers(model)
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # A network that is compiled would be compiled anew with these hooks in it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            predict(model, on_tensors(lambda each: each[:2], example))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    last: dict[nn.Parameter, int] = {}
    for module, call in calls.items():
        for parameter in module.parameters(recurse=False):
            last[parameter] = max(call, last.get(parameter, 0))

    def place(module: nn.Module) -> tuple[int, int]:
        # One whose weights are computed from parameters of its children has none of its own.
        own = [last[parameter] for parameter in module.parameters(recurse=False)]
        return max(own, default=calls[module]), calls[module]

    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module) for module in sorted(calls, key=place)]


@validated
def prefixes(
    model: nn.Module, example: Any, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Conv2d
) -> list[tuple[str, list[nn.Module]]]:
    """For each layer of `kind` in forward order: its name, and every module up to it, with its normalisation.

    A layer takes the normalisations that follow it along, up to the next layer that is none.

    Example:
        >>> import torch
        >>> from layerlab import prefixes
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 2, 3))
        >>> [(name, len(modules)) for name, modules in prefixes(network, torch.zeros(1, 1, 8, 8))]
        [('0', 2), ('2', 3)]
    """
    order = forward_order(model, example)
    found = []
    for index, (name, module) in enumerate(order):
        if not isinstance(module, kind):
            continue
        end = index + 1
        while end < len(order) and isinstance(order[end][1], NORMALISATION):
            end += 1
        found.append((name, [inner for _, inner in order[:end]]))
    return found
