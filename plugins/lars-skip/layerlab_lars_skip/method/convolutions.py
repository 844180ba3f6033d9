"""The convolutions of a network in forward order, and what can be skipped with them."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layerlab import Refused, measure, prefixes

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BY_HOOK = "a hook makes its weight (torch.nn.utils.weight_norm); use torch.nn.utils.parametrizations instead"


@dataclass(frozen=True)
class Convolutions:
    """The convolutions of a network in forward order.

    Attributes:
        names: qualified.
        prefixes: for each of them, every module that learns no later than it.
        most: how many of them may be skipped at once, so that something is left to learn.
        unmeasured: name of a convolution that has no nw → why; it is skipped with those that come after it.
    """

    names: tuple[str, ...] = ()
    prefixes: tuple[list[nn.Module], ...] = ()
    most: int = 0
    unmeasured: dict[str, str] = field(default_factory=dict)


def find_convolutions(network: nn.Module, example: Tensor) -> Convolutions:
    """Find the convolutions that a network runs, of any dimension, transposed or not, with parametrized weights or not.

    Args:
        network: is not changed.
        example: images as it takes them, (batch, channels, height, width).

    Raises:
        Refused: it has none, none that learns, or nothing would be left to learn without the first.
    """
    name = type(network).__name__
    found = prefixes(network, example, KINDS)
    if not found:
        raise Refused(f"lars-skip needs convolutions, and {name} has none; use another network.")
    if not any(_learns(network.get_submodule(layer)) for layer, _ in found):
        raise Refused(
            f"lars-skip skips convolutions that learn, and all {len(found)} of {name} are frozen; thaw one, or leave "
            "the strategy out."
        )
    # Each prefix holds the one before it, so what learns behind them only becomes less.
    most = bisect_left(found, True, key=lambda each: not _rest_learns(network, each[1]))
    if not most:
        raise Refused(
            f"lars-skip skips layers up to a convolution, and nothing in {name} learns after its first, {found[0][0]}; "
            "add or thaw a layer, or leave the strategy out."
        )
    unmeasured = {layer: BY_HOOK for layer, _ in found if not _has_weight(network.get_submodule(layer))}
    return Convolutions(tuple(layer for layer, _ in found), tuple(prefix for _, prefix in found), most, unmeasured)


def step_flops(network: nn.Module, example: Tensor, skipped: Iterable[nn.Module]) -> int:
    """FLOPs of forward and backward with some of a network's modules frozen, on a copy.

    Args:
        network: is not changed.
        example: images, (batch, channels, height, width).
        skipped: modules of the network.
    """
    names = {module: name for name, module in network.named_modules()}
    # In evaluation mode nothing is drawn at random and batch norm takes a batch of any size; the FLOPs are the same.
    model = copy.deepcopy(network).eval()
    for module in skipped:
        model.get_submodule(names[module]).requires_grad_(False)
    with measure.Meter() as meter, torch.enable_grad():
        model(example).sum().backward()
    assert meter.cost is not None
    return meter.cost.flops


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _rest_learns(network: nn.Module, prefix: Iterable[nn.Module]) -> bool:
    """Whether a parameter outside of a prefix learns."""
    inside = {parameter for module in prefix for parameter in module.parameters()}
    return any(parameter.requires_grad and parameter not in inside for parameter in network.parameters())


def _has_weight(module: nn.Module) -> bool:
    """Whether the weight is a parameter, or made of parameters whenever it is read."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own or parametrize.is_parametrized(module, "weight")
