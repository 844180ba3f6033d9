"""What people prune with today, at the same targets and after the same epochs as adaptive pruning.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, and two pruners of the
library torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch_pruning
from pydantic import PrivateAttr
from torch import fx, nn

from layerlab import Refused, Replaced, Run
from layerlab_adaptive_pruning.method.dependencies import recorded, refused_in_a_sentence
from layerlab_adaptive_pruning.method.pruning import Pruning, Target, thresholds
from layerlab_adaptive_pruning.method.structure import frozen_by_user
from layerlab_adaptive_pruning.method.surgery import below, remove_channels, scales


class NetworkSlimming(Pruning):
    """Network slimming to the letter: one threshold on |γ| for all batch norms, and the trunk is never pruned.

    Where branches are added up or concatenated, the layers that read the sum select the channels that they need, and
    the sum keeps its width. No layer goes: one that would lose everything keeps its strongest channel, where the
    authors' program fails. After the last pruning it fine-tunes without the penalty.
    """

    name: ClassVar[str] = "network-slimming"

    @property
    def sparsifies(self) -> bool:
        return len(self._stages) <= len(self.targets)

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        goal, threshold = self.limit(target)
        if goal != "threshold":
            threshold = self.found(run, target, thresholds(run.model),
                                   lambda copied, level: self._pruned(copied, run.example, level, check=False)[0])
        assert isinstance(run.model, fx.GraphModule)
        return *self._pruned(run.model, run.example, threshold), threshold

    def _pruned(
        self, network: fx.GraphModule, example: torch.Tensor, threshold: float, check: bool = True
    ) -> tuple[fx.GraphModule, list[Replaced]]:
        dead = below(network, threshold)
        for path, scale in scales(network).items():
            if len(dead[path]) == len(scale):
                dead[path].remove(int(scale.argmax()))
        return remove_channels(network, example, dead, inside_only=True, check=check)

    def cut(self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]) -> fx.GraphModule:
        return remove_channels(network, example, dead, inside_only=True)[0]


class TorchPruning(Pruning):
    """The library torch-pruning at the same targets.

    Its pruners rank groups of coupled channels, the trunk's too, over all layers at once, and keep a layer whole where
    it would lose everything. After the last pruning the network is fine-tuned without the penalty.
    """

    name: ClassVar[str] = "torch-pruning"

    pruner: Literal["BNScale", "GroupNorm"] = "BNScale"
    """`BNScale`: penalises |γ| and ranks groups by their mean |γ| over that of their layer's groups; `GroupNorm`:
    penalises and ranks the norms of all weights of a group, with `sparsity` as its `reg`."""

    _regularizer: Any = PrivateAttr(None)

    def on_fit_start(self, run: Run) -> None:
        """As `Pruning`.

        Raises:
            Refused: a target is a threshold on |γ|, which these pruners do not have.
        """
        if any("threshold" in target for target in self.targets):
            raise Refused(f"{self.name} has no threshold of its own; give ratio, parameters, latency or speedup.")
        self._regularizer = None
        super().on_fit_start(run)

    def on_epoch_end(self, run: Run) -> None:
        self._regularizer = None  # it holds modules of the library, which cannot be copied with the strategy

    @property
    def sparsifies(self) -> bool:
        return len(self._stages) <= len(self.targets)

    def on_after_backward(self, run: Run) -> None:
        if self.pruner == "BNScale":
            super().on_after_backward(run)
        elif self.sparsity and self.sparsifies:
            # The groups belong to one structure, which changes between epochs.
            if self._regularizer is None:
                self._regularizer = self._library(run.training_model, run.example, 0.5)
            self._regularizer.regularize(run.training_model)

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        ratios = [step / 1000 for step in range(1000)]
        ratio = self.found(run, target, ratios, lambda copied, share: self._pruned(copied, run.example, share)[0])
        assert isinstance(run.model, fx.GraphModule)
        return *self._pruned(run.model, run.example, ratio), ratio

    def _pruned(
        self, network: fx.GraphModule, example: torch.Tensor, ratio: float, everywhere: bool = False
    ) -> tuple[fx.GraphModule, list[Replaced]]:
        modes = {module: module.training for module in network.modules()}
        replaced: list[Replaced] = []
        with recorded(replaced), refused_in_a_sentence(network):
            self._library(network, example, ratio, everywhere).step()
        for module, training in modes.items():
            module.training = training
        return network, replaced

    def _library(self, network: nn.Module, example: torch.Tensor, ratio: float, everywhere: bool = False) -> Any:
        """The library's pruner; `everywhere`: each layer by itself loses that share."""
        kept = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        if isinstance(network, fx.GraphModule):
            kept += frozen_by_user(network)
        shared: dict[str, Any] = {"global_pruning": not everywhere, "pruning_ratio": ratio, "ignored_layers": kept}
        if self.pruner == "BNScale":
            importance = torch_pruning.importance.BNScaleImportance()
            return torch_pruning.pruner.BNScalePruner(network, example[:2], importance=importance, **shared)
        importance = torch_pruning.importance.GroupMagnitudeImportance()
        return torch_pruning.pruner.GroupNormPruner(network, example[:2], importance=importance, reg=self.sparsity,
                                                    **shared)

    def cut(self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]) -> fx.GraphModule:
        share = sum(map(len, dead.values())) / max(1, sum(map(len, scales(network).values())))
        return self._pruned(network, example, share, everywhere=True)[0]
