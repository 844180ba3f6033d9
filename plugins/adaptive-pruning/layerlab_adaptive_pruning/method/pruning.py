"""What methods share that prune between epochs: penalty, targets, the search for a threshold, going on afterwards."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import AfterValidator, Field, PrivateAttr
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import (
    LayerlabError,
    LayerlabWarning,
    LayerMap,
    Preflight,
    Refused,
    Replaced,
    Run,
    Strategy,
    first_line,
    measure,
)
from layerlab_adaptive_pruning.method.folding import fold
from layerlab_adaptive_pruning.method.groups import in_groups
from layerlab_adaptive_pruning.method.structure import name_of, rebuild, structure, trace
from layerlab_adaptive_pruning.method.surgery import scales

CLOSE = 0.005
"""A search ends when the cost is this much of the goal, or less, under it."""
OVERSHOT = 0.02
"""A pruning that ends further under its target than this share of it says so."""
SMALL = 0.01
"""|γ| below this counts as having gone to zero."""
ROUNDS = 15
"""Turns in which a trial's latency is measured during a search."""
CONFIRMING = 3 * ROUNDS
"""Turns in which the network that was found is measured again: of many trials, one may be within its limit by luck."""


class OutOfReach(LayerlabError):
    """However much is pruned, a target is not met."""


def _one_goal(target: dict[str, float]) -> dict[str, float]:
    if len(target) != 1:
        raise ValueError("a target has one goal: threshold, ratio, parameters, latency or speedup")
    ((goal, value),) = target.items()
    inside = {"ratio": value < 1, "latency": 0 < value < 1, "speedup": value > 1}
    if value < 0 or not inside.get(goal, True):
        raise ValueError(f"{goal} = {value:g} is out of range")
    return target


Target = Annotated[
    dict[Literal["threshold", "ratio", "parameters", "latency", "speedup"], float], AfterValidator(_one_goal)
]

MEASURED = {"latency", "speedup"}
"""Goals that are times."""


def count(network: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def channels(network: nn.Module) -> dict[str, int]:
    """Channels of every batch norm with a scale, by its path, in the order in which they run once it is traced."""
    return {path: len(scale) for path, scale in scales(network).items()}


def thresholds(network: nn.Module) -> list[float]:
    """Every threshold on |γ| that makes a difference, ascending; the first removes nothing."""
    found = list(scales(network).values())
    return [-1.0, *(torch.cat(found).unique().tolist() if found else [])]


class Pruning(Strategy):
    """What the methods share: an L1 penalty on γ, prunings between epochs, and a network that can be rebuilt."""

    needs: ClassVar[frozenset[str]] = frozenset({"one tensor"})
    changes_structure: ClassVar[bool] = True

    sparsity: float = Field(1e-4, ge=0)
    """λ of the penalty λ·Σ|γ| over all batch norms' scales."""
    targets: tuple[Target, ...] = ({"ratio": 0.2}, {"ratio": 0.4})
    """One a pruning, of what the network is to have become by then. `{"threshold": 0.01}`: channels with |γ| up to it
    go; `{"ratio": 0.4}`: that share of all batch norm channels is gone; `{"parameters": 950000}`: at most so many are
    left, or this share of them for a value up to 1; `{"latency": 0.6}`: a forward pass takes at most this share of the
    first network's time, both as `fold` makes them, measured by turns on this device; `{"speedup": 1.7}`: so many times
    faster, which is the inverse of `latency`."""
    every: int | None = Field(None, ge=1)
    """Epochs from one pruning to the next, and before the first. Default: so that all stages are equally long."""
    speed_batch: int = Field(1, ge=1)
    """Images a batch when time is measured for the goals `latency` and `speedup`."""

    _stages: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _dense: Any = PrivateAttr(None)
    _latency: float | None = PrivateAttr(None)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One row a pruning and one before the first: `epoch` after which it was, `parameters`, `channels` (path of a
        batch norm → how many are left of its channels; 0 when it is gone), `threshold` on |γ| (torch-pruning: the
        share of channels asked for; not a number where the target was out of reach and nothing was pruned), `small`
        (share of |γ| below 0.01 just before), `latency` (as a share of the first network's, None where it was no
        goal), and the network's `structure`, for `rebuild`."""
        return self._stages

    def preflight(self, network: nn.Module, example: torch.Tensor) -> Preflight:
        """Prune copies of the network: a third of each batch norm's channels, then all but one.

        Raises:
            Refused: it cannot be traced or cut, or has nothing that this method prunes.
        """
        traced = trace(copy.deepcopy(network))
        if not channels(traced) and not any(
            isinstance(module, nn.Conv2d) and module.out_channels == 1 for module in traced.modules()
        ):
            raise Refused(
                f"{self.name} needs batch norms with scales, or convolutions of one channel, and "
                f"{type(network).__name__} has neither; use another network."
            )
        sizes = channels(traced)
        third = {path: list(range(0, size, 3)) for path, size in sizes.items() if size > 1}
        part = self._rehearsed(traced, example, third)
        least = self._rehearsed(traced, example, {path: list(range(1, size)) for path, size in sizes.items()})
        before, after = _shapes(traced), _shapes(part)
        touched = [path for path, shapes in before.items() if after.get(path) != shapes]
        grouped = [path for path, module in traced.named_modules() if in_groups(module)]
        notes = []
        if grouped:
            notes.append(f"Convolutions in groups ({_few(grouped)}) lose as many channels in every group: a dead one "
                         "stays where another group has none left to lose.")
        return Preflight.of(
            network, touched, {path: "a convolution in groups with too few channels in each" for path in grouped
                               if path not in touched},
            otherwise="what writes or reads it keeps its width", notes=notes,
            saves={"parameters": 1 - count(least) / count(network)})

    def _rehearsed(
        self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]
    ) -> fx.GraphModule:
        """A copy of a traced network without those channels.

        Raises:
            Refused: it cannot be cut.
        """
        try:
            cut = self.cut(copy.deepcopy(network), example, dead).eval()
            with torch.no_grad():
                cut(example[:2])
        except LayerlabError as error:
            raise Refused(str(error)) from None
        except Exception as error:  # from inside the network, torch.fx or torch-pruning
            raise Refused(f"{self.name} cannot prune {name_of(network)}: the first cut, on a copy, ends in "
                          f"{type(error).__name__} ({first_line(error)}); use another network.") from None
        return cut

    def on_fit_start(self, run: Run) -> None:
        """Trace the network.

        Raises:
            Refused: it cannot be traced, or the epochs are too few for the prunings.
        """
        network = trace(run.model)
        self._stages, self._latency = [], None
        if self.targets and self._length(run) * len(self.targets) >= run.epochs:
            raise Refused(
                f"{self.name}: {len(self.targets)} prunings, one every {self._length(run)} epochs, leave no epoch of "
                f"{run.epochs} after the last; train longer or prune less often."
            )
        run.restructure(network)
        # The time of the network as it was is measured anew at each pruning, by turns with the pruned one's.
        timed = any(MEASURED & set(target) for target in self.targets)
        self._dense = fold(network) if timed else None
        self._note(run, 0, 0.0, 0.0)

    @abstractmethod
    def cut(self, network: fx.GraphModule, example: torch.Tensor, dead: Mapping[str, list[int]]) -> fx.GraphModule:
        """Cut a copy of the network as this method would if those channels were to go."""

    def on_load_checkpoint(self, run: Run) -> None:
        if len(self._stages) > 1:
            before = dict(run.model.named_parameters())
            network = self.rebuild(run.model)
            run.restructure(network, [Replaced(before[name], new, None)
                                      for name, new in network.named_parameters() if name in before])

    def on_epoch_start(self, run: Run) -> None:
        done = len(self._stages) - 1
        if done < len(self.targets) and run.epoch == self._length(run) * (done + 1) + 1:
            found = torch.cat([torch.ones(0), *(scale.cpu() for scale in scales(run.model).values())])
            small = float((found < SMALL).float().mean()) if len(found) else 0.0
            self._latency = None
            try:
                network, replaced, threshold = self.prune(run, self.targets[done])
            except OutOfReach as error:
                # An error would throw away the training so far, whose settings can no longer be changed.
                warnings.warn(f"{error} It stays as it is at this pruning.", LayerlabWarning, stacklevel=2)
                threshold = math.nan
            else:
                run.restructure(network, replaced)
            self._note(run, run.epoch - 1, threshold, small)
            run.log(f"{self.name}/small_scales", small)
        run.log(f"{self.name}/parameters", count(run.model))
        if self._stages[-1].get("latency") is not None:
            run.log(f"{self.name}/latency", self._stages[-1]["latency"])
        run.log(f"{self.name}/channels", sum(channels(run.model).values()))
        run.log(f"{self.name}/blocks_removed", blocks_removed(self._stages[-1]["channels"]))
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
        """What a goal limits, as a share of the first network's: channels, parameters, or latency."""
        if goal == "ratio":
            return sum(channels(network).values()) / sum(self._stages[0]["channels"].values())
        if goal == "parameters":
            return count(network) / self._stages[0]["parameters"]
        return self.latency(network, run)

    def latency(self, network: nn.Module, run: Run, rounds: int = ROUNDS) -> float:
        """Time of a forward pass of `speed_batch` images, as a share of the first network's; both folded, by turns."""
        images = run.example[:1].expand(self.speed_batch, *run.example.shape[1:]).contiguous()
        turns = latencies({"dense": self._dense, "pruned": fold(network)}, images, rounds)
        return turns["pruned"].ratio(turns["dense"])[0]

    def found(self, run: Run, target: Target, levels: list[float],
              trial: Callable[[fx.GraphModule, float], fx.GraphModule]) -> float:
        """The level of pruning that meets a target.

        Args:
            levels: ascending.
            trial: prunes a copy of the network to a level.

        Raises:
            OutOfReach: none meets it.
        """
        goal, limit = self.limit(target)
        wanted = f"{self.name}: {goal} {next(iter(target.values())):g}"
        wanted += f" at batch {self.speed_batch}" if goal in MEASURED else ""
        counted = {"ratio": "channels", "parameters": "parameters"}.get(goal, "latency")
        assert isinstance(run.model, fx.GraphModule)
        network = run.model
        level, reached, above = search(
            lambda level: self.cost(trial(copy.deepcopy(network), level), run, goal), levels, limit, wanted, counted)
        if goal in MEASURED:
            level, self._latency = confirmed(
                lambda level: self.latency(trial(copy.deepcopy(network), level), run, CONFIRMING),
                levels[levels.index(level) :], limit, wanted)
            return level
        if reached < limit * (1 - OVERSHOT):
            missed = f", and pruning any less leaves {above:.1%}" if math.isfinite(above) else ""
            warnings.warn(f"{wanted} allows {limit:.1%} of the first network's {counted}; {reached:.1%} are left"
                          f"{missed}, because whole layers, or a channel of every "
                          "group, go at one step.", LayerlabWarning, stacklevel=2)
        return level

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

    def _note(self, run: Run, epoch: int, threshold: float, small: float) -> None:
        traced = run.model
        assert isinstance(traced, fx.GraphModule)
        left = channels(traced)
        first = self._stages[0]["channels"] if self._stages else left
        self._stages.append({
            "epoch": epoch, "parameters": count(run.model), "threshold": threshold, "small": small,
            "latency": self._latency,
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


def shrink(weights: list[nn.Parameter], sparsity: float) -> None:
    """Add λ·sign(γ), the gradient of λ·|γ|, to the gradients of those that have one (Section 4.2)."""
    found: list[torch.Tensor] = [weight for weight in weights if weight.grad is not None]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if found:
        torch._foreach_add_(gradients, torch._foreach_sign(found), alpha=sparsity)


def _shapes(network: nn.Module) -> dict[str, list[torch.Size]]:
    """Path of a module → shapes of the parameters that it holds itself."""
    found = {path: [parameter.shape for parameter in module.parameters(recurse=False)]
             for path, module in network.named_modules()}
    return {path: shapes for path, shapes in found.items() if shapes}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def blocks_removed(left: Mapping[str, int]) -> int:
    """How many modules have lost all their batch norms.

    Args:
        left: path of a batch norm → channels that it has left, 0 where it is gone.

    Example:
        >>> blocks_removed({"block1.bn1": 0, "block1.bn2": 0, "block2.bn1": 4, "block2.bn2": 0})
        1
    """
    owners: dict[str, int] = {}
    for path, count in left.items():
        owner = path.rpartition(".")[0]
        owners[owner] = owners.get(owner, 0) + count
    return sum(count == 0 for owner, count in owners.items() if owner)


def out_of_reach(wanted: str, least: float, limit: float, counted: str) -> OutOfReach:
    """The error that says how far pruning comes, and what to do."""
    return OutOfReach(f"{wanted} is out of reach: at the least, the network has {least:.1%} of the first one's "
                      f"{counted}, and {limit:.1%} is wanted; ask for less, or start from a wider network.")


def search(cost: Callable[[float], float], levels: list[float], limit: float, wanted: str,
           counted: str) -> tuple[float, float, float]:
    """The first of ascending levels, or one close to it, at which the cost is within its limit.

    In eighths of the levels from below, since torch-pruning's cost rises again where whole layers would go, which it
    then keeps. Then by interpolation and by halves in turn: each trial cuts a copy of the network.

    Args:
        cost: of a level.
        levels: ascending.
        limit: of the cost.
        wanted: names the target in an error.
        counted: names in an error what the cost is a share of.

    Returns:
        (the level, its cost, the cost of the highest level below it that was tried; NaN if there was none).

    Raises:
        OutOfReach: none is.
    """
    low, above, least = -1, math.nan, math.inf
    for step in range(1, 9):
        high = (len(levels) - 1) * step // 8
        reached = cost(levels[high])
        least = min(least, reached)
        if reached <= limit:
            break
        low, above = high, reached
    else:
        raise out_of_reach(wanted, least, limit, counted)
    halve = False
    while high - low > 1 and reached < limit * (1 - CLOSE):
        middle = (low + high) // 2
        if not halve and math.isfinite(above):
            middle = low + round((high - low) * (above - limit) / (above - reached))
            middle = min(max(middle, low + 1), high - 1)
        halve = not halve
        value = cost(levels[middle])
        if value <= limit:
            high, reached = middle, value
        else:
            low, above = middle, value
    return levels[high], reached, above


def confirmed(latency: Callable[[float], float], levels: list[float], limit: float, wanted: str) -> tuple[float, float]:
    """The first of ascending levels, in steps, whose latency is within its limit; for levels from the one on that a
    search found, and a latency that is measured for longer than the search's.

    Returns:
        (the level, its latency).

    Raises:
        OutOfReach: none is.
    """
    step = max(1, len(levels) // 50)
    for level in [*levels[:-1:step], levels[-1]]:
        reached = latency(level)
        if reached <= limit:
            return level, reached
    raise out_of_reach(wanted, reached, limit, "latency")


def latencies(
    networks: Mapping[str, nn.Module], images: torch.Tensor, rounds: int = ROUNDS
) -> dict[str, measure.Turns]:
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
