"""Adaptive pruning while the network trains, and network slimming as the peer beside it.

Zhang et al., "Layer Pruning for Accelerating Very Deep Neural Networks" (Section 4), and Liu et al., "Learning
Efficient Convolutional Networks through Network Slimming", ICCV 2017, in torch-pruning's implementation.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pandas as pd
import torch
import torch_pruning
from pydantic import AfterValidator, Field, PrivateAttr
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import LayerlabError, LayerlabWarning, LayerMap, Replaced, Run, Strategy, measure
from layerlab_adaptive_pruning.method.dependencies import recorded
from layerlab_adaptive_pruning.method.structure import rebuild, structure, trace
from layerlab_adaptive_pruning.method.surgery import below, merge_thin_layers, remove_channels, scales

CLOSE = 0.005
"""A search ends when the cost is this much of the goal, or less, under it."""


class OutOfReach(LayerlabError):
    """However much is pruned, a target is not met."""


def _one_goal(target: dict[str, float]) -> dict[str, float]:
    if len(target) != 1:
        raise ValueError("a target has one goal: threshold, ratio, parameters or speedup")
    ((goal, value),) = target.items()
    if value < 0 or (goal == "ratio" and value >= 1) or (goal == "speedup" and value <= 1):
        raise ValueError(f"{goal} = {value:g} is out of range")
    return target


Target = Annotated[
    dict[Literal["threshold", "ratio", "parameters", "speedup"], float], AfterValidator(_one_goal)
]


def count(network: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def channels(network: nn.Module) -> dict[str, int]:
    """Channels of every batch norm with a scale, by its path, in the order in which they run once it is traced."""
    return {path: len(scale) for path, scale in scales(network).items()}


class Pruning(Strategy):
    """What the two methods share: an L1 penalty on γ, prunings between epochs, and a network that can be rebuilt."""

    changes_structure: ClassVar[bool] = True

    sparsity: float = Field(1e-4, ge=0)
    """λ of the penalty λ·Σ|γ| over all batch norms' scales."""
    targets: tuple[Target, ...] = ({"ratio": 0.2}, {"ratio": 0.4})
    """One a pruning, of what the network is to have become by then. `{"threshold": 0.01}`: channels with |γ| up to it
    go; `{"ratio": 0.4}`: that share of all batch norm channels is gone; `{"parameters": 950000}`: at most so many are
    left, or this share of them for a value up to 1; `{"speedup": 1.7}`: so many times faster, measured on this
    device."""
    every: int | None = Field(None, ge=1)
    """Epochs from one pruning to the next, and before the first. Default: so that all stages are equally long."""
    speed_batch: int = Field(1, ge=1)
    """Images a batch when speed is measured for the goal `speedup`."""

    _stages: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _dense: Any = PrivateAttr(None)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One row a pruning and one before the first: `epoch` after which it was, `parameters`, `channels` (path of a
        batch norm → how many are left of its channels; 0 when it is gone), `threshold` on |γ| (network slimming: the
        share of channels asked for; not a number where the target was out of reach and nothing was pruned), and the
        network's `structure`, for `rebuild`."""
        return self._stages

    def on_fit_start(self, run: Run) -> None:
        """Trace the network.

        Raises:
            LayerlabError: it cannot be traced, or has nothing that this method prunes.
        """
        network = trace(run.model)
        self._stages = []
        if not channels(network) and not any(
            isinstance(module, nn.Conv2d) and module.out_channels == 1 for module in network.modules()
        ):
            raise LayerlabError(
                f"{self.name} needs batch norms with scales, or convolutions of one channel, and "
                f"{type(run.model).__name__} has neither; use another network."
            )
        if self.targets and self._length(run) * len(self.targets) >= run.epochs:
            raise LayerlabError(
                f"{self.name}: {len(self.targets)} prunings, one every {self._length(run)} epochs, leave no epoch of "
                f"{run.epochs} after the last; train longer or prune less often."
            )
        run.restructure(network)
        # The speed of the network as it was is measured anew at each pruning, by turns with the pruned one's.
        self._dense = copy.deepcopy(network) if any("speedup" in target for target in self.targets) else None
        self._note(run, 0, 0.0)

    def on_load_checkpoint(self, run: Run) -> None:
        if len(self._stages) > 1:
            before = dict(run.model.named_parameters())
            network = self.rebuild(run.model)
            run.restructure(network, [Replaced(before[name], new, None)
                                      for name, new in network.named_parameters() if name in before])

    def on_epoch_start(self, run: Run) -> None:
        done = len(self._stages) - 1
        if done < len(self.targets) and run.epoch == self._length(run) * (done + 1) + 1:
            try:
                network, replaced, threshold = self.prune(run, self.targets[done])
            except OutOfReach as error:
                # An error would throw away the training so far, whose settings can no longer be changed.
                warnings.warn(f"{error} It stays as it is at this pruning.", LayerlabWarning, stacklevel=2)
                threshold = math.nan
            else:
                run.restructure(network, replaced)
            self._note(run, run.epoch - 1, threshold)
        run.log(f"{self.name}/parameters", count(run.model))
        run.log(f"{self.name}/channels", sum(channels(run.model).values()))
        run.log(f"{self.name}/convolutions", sum(isinstance(each, nn.Conv2d) for each in run.model.modules()))

    def on_after_backward(self, run: Run) -> None:
        if self.sparsity and self.sparsifies:
            with torch.no_grad():
                shrink([module.weight for module in run.training_model.modules()
                        if isinstance(module, _BatchNorm) and module.affine], self.sparsity)

    @property
    def sparsifies(self) -> bool:
        """Whether the penalty acts at present."""
        return True

    @abstractmethod
    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        """Prune the network that `run` trains until it meets a target.

        Returns:
            (the network, the parameters that were replaced, the threshold on |γ|).

        Raises:
            OutOfReach: whatever is pruned, the network stays above the target.
        """

    def cost(self, network: nn.Module, run: Run, goal: str) -> float:
        """What a goal limits: channels or parameters, as shares of the first network's, or seconds."""
        if goal == "ratio":
            return sum(channels(network).values()) / sum(self._stages[0]["channels"].values())
        if goal == "parameters":
            return count(network) / self._stages[0]["parameters"]
        images = run.example[:1].expand(self.speed_batch, *run.example.shape[1:]).contiguous()
        turns = latencies({"dense": self._dense, "pruned": network}, images, rounds=15)
        return turns["pruned"].ratio(turns["dense"])[0]

    def limit(self, target: Target) -> tuple[str, float]:
        """A target as (goal, the most that `cost` may be)."""
        ((goal, value),) = target.items()
        if goal == "parameters" and value > 1:
            value /= self._stages[0]["parameters"]
        if goal == "ratio":
            return goal, 1 - value
        return goal, 1 / value if goal == "speedup" else value

    def _length(self, run: Run) -> int:
        return self.every or max(1, run.epochs // (len(self.targets) + 1))

    def _note(self, run: Run, epoch: int, threshold: float) -> None:
        traced = run.model
        assert isinstance(traced, fx.GraphModule)
        left = channels(traced)
        first = self._stages[0]["channels"] if self._stages else left
        self._stages.append({
            "epoch": epoch, "parameters": count(run.model), "threshold": threshold,
            "channels": {path: left.get(path, 0) for path in first}, "structure": structure(traced),
        })

    def state_dict(self) -> dict[str, Any]:
        return {"stages": self._stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stages = list(state["stages"])

    def rebuild(self, network: nn.Module) -> fx.GraphModule:
        """The structure after the last pruning."""
        return rebuild(network, self._stages[-1]["structure"])

    def layer_maps(self, history: Sequence[Mapping[str, Any]]) -> dict[str, LayerMap]:
        """What is left of each batch norm's channels in each epoch."""
        first = self._stages[0]["channels"]
        table = {}
        for row in history:
            stage = [each for each in self._stages if each["epoch"] < row["epoch"]][-1]
            table[row["epoch"]] = [100 * stage["channels"][path] / first[path] for path in first]
        return {"channels": LayerMap(pd.DataFrame(table, index=list(first)), "channels left [%]")}


class AdaptivePruning(Pruning):
    """Prune channels and layers again and again, fine-tuning and sparsifying at once all the while (Section 4.3).

    One threshold on |γ| for all layers decides what goes, so that the share of each layer is learned. A layer of which
    one channel is left is bridged by a 1 × 1 convolution (Section 4.4): a residual branch with it goes altogether.
    """

    name: ClassVar[str] = "adaptive-pruning"

    bridge: Literal["zero", "merge"] = "zero"
    """A batch norm with one channel left: `zero`: the branch that it is in is removed (4.4.1); `merge`: conv–BN–conv
    becomes one 1 × 1 convolution (4.4.2). Where there is no way around, always `merge`."""

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        goal, limit = self.limit(target)
        if goal == "threshold":
            return *self._pruned(run.model, run, limit), limit
        found = scales(run.model)
        levels = torch.cat(list(found.values())).unique().tolist() if found else []
        threshold = search(lambda level: self.cost(self._pruned(copy.deepcopy(run.model), run, level)[0], run, goal),
                           [-1.0, *levels], limit, f"{self.name}: {goal} {next(iter(target.values())):g}")
        return *self._pruned(run.model, run, threshold), threshold

    def _pruned(self, network: nn.Module, run: Run, threshold: float) -> tuple[fx.GraphModule, list[Replaced]]:
        cut, replaced = remove_channels(network, run.example, below(network, threshold), self.bridge)
        merged, more = merge_thin_layers(cut)
        return merged, replaced + more


class NetworkSlimming(Pruning):
    """The peer: network slimming as torch-pruning offers it, at the same targets and after the same epochs.

    Its `BNScalePruner` ranks groups of coupled channels by their mean |γ| over that of their layer's groups, over all
    layers at once, and keeps a layer whole where it would lose everything. After the last pruning it fine-tunes without
    the penalty.
    """

    name: ClassVar[str] = "network-slimming"

    @property
    def sparsifies(self) -> bool:
        return len(self._stages) <= len(self.targets)

    def prune(self, run: Run, target: Target) -> tuple[fx.GraphModule, list[Replaced], float]:
        goal, limit = self.limit(target)
        if goal == "threshold":
            raise LayerlabError(f"{self.name} has no threshold of its own; give ratio, parameters or speedup.")
        ratios = [step / 1000 for step in range(1000)]
        ratio = search(lambda share: self.cost(self._pruned(copy.deepcopy(run.model), run, share)[0], run, goal),
                       ratios, limit, f"{self.name}: {goal} {next(iter(target.values())):g}")
        return *self._pruned(run.model, run, ratio), ratio

    def _pruned(self, network: nn.Module, run: Run, ratio: float) -> tuple[fx.GraphModule, list[Replaced]]:
        modes = {module: module.training for module in network.modules()}
        replaced: list[Replaced] = []
        outputs = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        with recorded(replaced):
            pruner = torch_pruning.pruner.BNScalePruner(
                network, run.example, importance=torch_pruning.importance.BNScaleImportance(), global_pruning=True,
                pruning_ratio=ratio, ignored_layers=outputs,
            )
            pruner.step()
        for module, training in modes.items():
            module.training = training
        assert isinstance(network, fx.GraphModule)
        return network, replaced


def shrink(weights: list[nn.Parameter], sparsity: float) -> None:
    """Add λ·sign(γ), the gradient of λ·|γ|, to the gradients of those that have one (Section 4.2)."""
    found: list[torch.Tensor] = [weight for weight in weights if weight.grad is not None]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if found:
        torch._foreach_add_(gradients, torch._foreach_sign(found), alpha=sparsity)


def search(cost: Callable[[float], float], levels: list[float], limit: float, wanted: str) -> float:
    """The first of ascending levels, or one close to it, at which the cost is within its limit.

    In eighths of the levels from below, then by halves: network slimming's cost rises again where whole layers would
    go, which it then keeps.

    Raises:
        OutOfReach: none is.
    """
    low, least = -1, math.inf
    for step in range(1, 9):
        high = (len(levels) - 1) * step // 8
        reached = cost(levels[high])
        least = min(least, reached)
        if reached <= limit:
            break
        low = high
    else:
        raise OutOfReach(f"{wanted} is out of reach: at the least, the network has {least:.1%} of what it had, and "
                         f"{limit:.1%} is wanted.")
    while high - low > 1 and reached < limit * (1 - CLOSE):
        middle = (low + high) // 2
        value = cost(levels[middle])
        if value <= limit:
            high, reached = middle, value
        else:
            low = middle
    return levels[high]


def latencies(networks: dict[str, nn.Module], images: torch.Tensor, rounds: int = 15) -> dict[str, measure.Turns]:
    """Seconds of one forward pass of each network in evaluation mode, by turns; the modes stay as they are."""
    modes = {module: module.training for network in networks.values() for module in network.modules()}
    for network in networks.values():
        network.eval()

    def run(network: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                network(images)
        return call

    found = measure.time_by_turns({name: run(network) for name, network in networks.items()}, rounds,
                                  device=str(images.device))
    for module, training in modes.items():
        module.training = training
    return found
