"""Convolutions in groups: as many channels go in every group, whichever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from layerlab import Replaced

Side = Literal["inputs", "outputs"]


class Grouped(nn.Conv2d):
    """What a convolution in groups is called while torch-pruning sees it, which knows pruning functions by class."""


def in_groups(module: nn.Module) -> bool:
    """Whether a layer is a convolution in groups of several channels; torch-pruning itself cuts depthwise ones.

    Example:
        >>> in_groups(nn.Conv2d(8, 8, 3, groups=2)), in_groups(nn.Conv2d(8, 8, 3, groups=8))
        (True, False)
    """
    if not isinstance(module, nn.Conv2d) or module.groups == 1:
        return False
    return not module.groups == module.in_channels == module.out_channels


@contextmanager
def called_grouped(network: nn.Module) -> Iterator[None]:
    """Within it the network's convolutions in groups are of the class `Grouped`."""
    found = [module for module in network.modules() if type(module) is nn.Conv2d and in_groups(module)]
    for module in found:
        module.__class__ = Grouped
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.Conv2d


class GroupedPruner(BasePruningFunc):
    """Notes which channels torch-pruning takes from convolutions in groups; `finish` then cuts all at once.

    torch-pruning's own function takes the same inputs from each group, those of the first. And where the inputs are a
    concatenation, they go in several steps, between which the groups are not of one size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[nn.Conv2d, dict[Side, list[int]]] = {}

    def _take(self, layer: nn.Conv2d, side: Side, places: Sequence[int]) -> nn.Conv2d:
        left = self._left.setdefault(
            layer, {"inputs": list(range(layer.in_channels)), "outputs": list(range(layer.out_channels))})
        gone = set(places)
        left[side] = [channel for place, channel in enumerate(left[side]) if place not in gone]
        layer.in_channels, layer.out_channels = len(left["inputs"]), len(left["outputs"])
        return layer

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Take outputs away."""
        return self._take(layer, "outputs", idxs)

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Take inputs away."""
        return self._take(layer, "inputs", idxs)

    def get_out_channels(self, layer: Any) -> int:
        """How many outputs are left."""
        return layer.out_channels

    def get_in_channels(self, layer: Any) -> int:
        """How many inputs are left."""
        return layer.in_channels

    def finish(self, replaced: list[Replaced]) -> None:
        """Give the convolutions the weights that are left of them.

        Args:
            replaced: gets the parameters.
        """
        for layer, left in self._left.items():
            groups, device = layer.groups, layer.weight.device
            rows = torch.tensor(left["outputs"], device=device)
            # (groups, inputs left of a group), counted within the group.
            columns = torch.tensor(left["inputs"], device=device).view(groups, -1) % layer.weight.shape[1]
            columns = columns.repeat_interleave(len(rows) // groups, 0)  # (outputs left, inputs left of a group)

            def cut(tensor: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
                return torch.take_along_dim(tensor.index_select(0, rows), columns[:, :, None, None], 1)

            def cut_bias(tensor: Tensor, rows: Tensor = rows) -> Tensor:
                return tensor.index_select(0, rows)

            for name, carry in (("weight", cut), ("bias", cut_bias)):
                old = getattr(layer, name)
                if old is not None:
                    new = nn.Parameter(carry(old.detach()), requires_grad=old.requires_grad)
                    setattr(layer, name, new)
                    replaced.append(Replaced(old, new, carry))


@dataclass(eq=False)
class Candidate:
    """A set of coupled channels, some of which can go.

    Attributes:
        root: the layer that the set is named by.
        handler: torch-pruning's function that cuts it.
        constant: which of the set's channels can go, (channels,).
        strength: the largest |γ| of each, (channels,).
        readers: (layer, its inputs, the set's channels that they are).
        demands: (convolution in groups, side, its channels, the set's channels that they are).
    """

    root: nn.Module
    handler: Any
    constant: Tensor
    strength: Tensor
    readers: list[tuple[nn.Module, list[int], list[int]]] = field(default_factory=list)
    demands: list[tuple[nn.Conv2d, Side, list[int], list[int]]] = field(default_factory=list)


def balance(candidates: Sequence[Candidate]) -> None:
    """Let as many channels go in every group of each convolution in groups, and at least one stay; the weakest go.

    A set's channel that stays for one convolution stays for all, so this is repeated until nothing changes.

    Args:
        candidates: whose `constant` is changed.
    """
    sides: dict[tuple[nn.Conv2d, Side], list[tuple[Candidate, Tensor, Tensor]]] = {}
    for each in candidates:
        for module, side, channels, of_set in each.demands:
            part = each, torch.tensor(channels), torch.tensor(of_set)
            sides.setdefault((module, side), []).append(part)
    changed = True
    while changed:
        changed = any([_balance_one(module, side, parts) for (module, side), parts in sides.items()])


def _balance_one(module: nn.Conv2d, side: Side, parts: Sequence[tuple[Candidate, Tensor, Tensor]]) -> bool:
    """Balance one side of one convolution; whether a channel stays that would have gone."""
    size = module.in_channels if side == "inputs" else module.out_channels
    goes, strength = torch.zeros(size, dtype=torch.bool), torch.zeros(size)
    for each, channels, of_set in parts:
        goes[channels], strength[channels] = each.constant[of_set], each.strength[of_set]
    by_group = goes.view(module.groups, -1)
    count = min(int(by_group.sum(1).min()), by_group.shape[1] - 1)
    # What stays anyway sorts last, and of what may go the weakest come first.
    order = strength.view(module.groups, -1).masked_fill(~by_group, torch.inf).argsort(stable=True, dim=1)
    allowed = torch.zeros_like(by_group).scatter_(1, order[:, :count], True).flatten()
    if torch.equal(allowed, goes):
        return False
    for each, channels, of_set in parts:
        each.constant[of_set[~allowed[channels]]] = False
    return True
