"""FreezeOut: each layer's learning rate is annealed to zero at a time of its own, and then the layer is frozen.

A. Brock, T. Lim, J. M. Ritchie, N. Weston, "FreezeOut: Accelerate Training by Progressively Freezing Layers",
arXiv 1706.04983, 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from layerlab import LayerlabError, Run, Strategy, prefixes

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# The key of a parameter group under which the optimizer, and so a checkpoint, keeps the group's last epoch.
LAST_EPOCH = "freezeout_last_epoch"


def freezing_times(layers: int, t_0: float, spacing: Literal["linear", "cubic"]) -> list[float]:
    """t_i of each layer, as a share of the training: linear from t_0 to 1, or the cubes of that.

    Args:
        layers: how many there are; the last one trains to the end.
        t_0: of the first layer; with `cubic`, before it is cubed.
        spacing: how the others follow.

    Returns:
        Ascending, the last one 1.
    """
    times = [t_0 + (1 - t_0) * index / max(1, layers - 1) for index in range(layers - 1)] + [1.0]
    return [time**3 for time in times] if spacing == "cubic" else times


def rate(t: float, t_i: float, scaled: bool) -> float:
    """α_i(t)/α = ½ (1 + cos(π t/t_i)), zero from t_i on; with `scaled` times 1/t_i.

    The scaled curves of all layers have the same area: each layer may go as far as the others, in less time.

    Args:
        t: the share of the training that is over.
        t_i: the share after which the layer is frozen.
    """
    return 0.5 * (1 + math.cos(math.pi * min(t, t_i) / t_i)) / (t_i if scaled else 1.0)


class FreezeOut(Strategy):
    """Train each layer for a set part of the run and then freeze it, the earliest layers first.

    The learning rate of layer i falls from its start to zero along half a cosine that ends at t_i; from then on the
    layer is excluded from the backward pass. This is the whole schedule of the run's learning rates: whatever `fit` was
    told about one (`schedule`, `milestones`) is replaced.

    Layers freeze between epochs, so t_i is rounded to whole epochs.
    """

    name: ClassVar[str] = "freezeout"

    t_0: float = Field(0.8, gt=0, le=1)
    """When the first layer freezes, as a share of the training; with cubic spacing before it is cubed. 1 freezes
    nothing: all layers follow one cosine."""
    spacing: Literal["linear", "cubic"] = "cubic"
    """How t_i runs from the first layer's to 1: linearly, or as the cube of that, which gives later layers more."""
    scaled: bool = True
    """Multiply a layer's initial rate by 1/t_i, so that every layer's rates add up to the same."""

    _layers: list[str] = PrivateAttr(default_factory=list)
    _last_epochs: list[int] = PrivateAttr(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """The names of the layers in the order of the forward pass."""
        return self._layers

    @property
    def last_epochs(self) -> list[int]:
        """The last epoch in which each of them learns."""
        return self._last_epochs

    def on_fit_start(self, run: Run) -> None:
        """Give each layer a group of the optimizer's parameters, and put the schedule in place.

        Raises:
            LayerlabError: a network of fewer than two layers, which has nothing to freeze.
        """
        found = prefixes(run.model, run.example, LAYERS)
        if len(found) < 2:
            raise LayerlabError(
                f"freezeout needs a network of two layers or more, and {type(run.model).__name__} has {len(found)}; "
                "use another network."
            )
        self._layers = [name for name, _ in found]
        times = freezing_times(len(found), self.t_0, self.spacing)
        self._last_epochs = [min(run.epochs, max(1, round(time * run.epochs))) for time in times]
        self._split(run, [modules for _, modules in found])
        steps = run.epochs * (len(run.data) // run.batch_size)
        factors = [self._annealing(group[LAST_EPOCH], run.epochs, steps) for group in run.optimizer.param_groups]
        run.schedule = LambdaLR(run.optimizer, factors)
        run.schedule_each = "step"

    def on_epoch_start(self, run: Run) -> None:
        # By the optimizer's groups, which follow when another strategy puts new parameters in the place of old ones.
        done = {parameter for group in run.optimizer.param_groups if group[LAST_EPOCH] < run.epoch
                for parameter in group["params"]}
        own = {module: list(module.parameters(recurse=False)) for module in run.model.modules()}
        run.freeze(self.name, [module for module, mine in own.items() if mine and done.issuperset(mine)])
        run.log(f"{self.name}/frozen_layers", sum(last < run.epoch for last in self._last_epochs))

    def _annealing(self, last: int, epochs: int, steps: int) -> Callable[[int], float]:
        return lambda step: rate(step / steps, last / epochs, self.scaled)

    def _split(self, run: Run, reached: list[list[nn.Module]]) -> None:
        """Split the optimizer's groups by layer, the last layer first, since what joins later joins the first group.

        A parameter that no layer holds (a class token, say) goes with the last one.
        """
        layer_of: dict[nn.Parameter, int] = {}
        for index, modules in enumerate(reached):
            for module in modules:
                for parameter in module.parameters():
                    layer_of.setdefault(parameter, index)
        groups = []
        for index in reversed(range(len(reached))):
            for group in run.optimizer.param_groups:
                mine = [parameter for parameter in group["params"]
                        if layer_of.get(parameter, len(reached) - 1) == index]
                if mine:
                    groups.append({**group, "params": mine, LAST_EPOCH: self._last_epochs[index]})
        run.optimizer.param_groups[:] = groups
