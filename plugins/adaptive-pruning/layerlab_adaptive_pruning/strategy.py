"""Adaptive pruning while the network trains.

Zhang et al., "Layer Pruning for Accelerating Very Deep Neural Networks", Section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import fx

from layerlab import FitResult, Replaced, Run
from layerlab_adaptive_pruning.method.pruning import Pruning, Target, thresholds
from layerlab_adaptive_pruning.method.surgery import Bridge, below, merge_thin_layers, remove_channels, scales


class AdaptivePruning(Pruning):
    """Prune channels and layers again and again, fine-tuning and sparsifying at once all the while (Section 4.3).

    One threshold on |γ| for all layers decides what goes, so that the share of each layer is learned. A layer of which
    one channel is left is bridged by a 1 × 1 convolution (Section 4.4): a residual branch with it goes altogether.
    """

    name: ClassVar[str] = "adaptive-pruning"

    bridge: Bridge = "zero"
    """A batch norm with one channel left: `zero`: the branch that it is in is removed (4.4.1); the others make
    conv–BN–conv one 1 × 1 convolution, with weights conv2 · BN · conv1 (`merge`, 4.4.2 with the activation taken as
    open), conv2(ReLU(BN(weights of conv1))) (`relu`, 4.4.2 to the letter), or drawn at random (`random`, to which 4.4.3
    compares). Where there is no way around, `zero` acts as `merge`."""

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        goal, threshold = self.limit(target)
        if goal != "threshold":
            threshold = self.found(run, target, thresholds(run.model),
                                   lambda copied, level: self._pruned(copied, run, level, check=False)[0])
        assert isinstance(run.model, fx.GraphModule)
        return *self._pruned(run.model, run, threshold), threshold

    def _pruned(
        self, network: fx.GraphModule, run: Run, threshold: float, check: bool = True
    ) -> tuple[fx.GraphModule, list[Replaced]]:
        cut, replaced = remove_channels(network, run.example, below(network, threshold), self.bridge, check=check)
        merged, more = merge_thin_layers(cut, self.bridge)
        return merged, replaced + more

    def placebo(self, result: FitResult) -> RandomChannels:
        """As many channels of each batch norm after the same epochs, drawn at random."""
        return RandomChannels(left=tuple(stage["channels"] for stage in self.stages[1:]), targets=self.targets,
                              every=self.every, sparsity=self.sparsity)

    def cut(self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]) -> fx.GraphModule:
        cut, _ = remove_channels(network, example, dead, self.bridge)
        return merge_thin_layers(cut, self.bridge)[0]


class RandomChannels(Pruning):
    """The placebo: as many channels as another pruning left of each batch norm, but any of them."""

    name: ClassVar[str] = "random-channels"

    left: tuple[dict[str, int], ...] = ()
    """One a pruning: path of a batch norm → channels that it is to have left; 0 for a layer that goes."""
    seed: int = 0
    """Of the draw."""

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        assert isinstance(run.model, fx.GraphModule)
        dead = {}
        for path, wanted in self.left[len(self.stages) - 1].items():
            size = len(scales(run.model).get(path, ()))
            if size > wanted:
                # One draw for all norms of a size, so that branches that are added up lose the same channels.
                order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
                dead[path] = order[: size - wanted].tolist()
        return *remove_channels(run.model, run.example, dead, "merge"), math.nan

    def cut(self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]) -> fx.GraphModule:
        return remove_channels(network, example, dead, "merge")[0]
