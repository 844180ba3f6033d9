"""What the steps of each epoch cost: FLOPs, bytes, peak memory, from a few steps that are measured."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from layerlab.contract.run import Run
from layerlab.measure.cost import Meter, StepCost
from layerlab.show.interval import mean_interval


def learning_key(run: Run) -> str:
    """A digest of what learns: names and shapes of the parameters with gradients, and the batch's shape."""
    parts = [f"{name}{tuple(p.shape)}" for name, p in run.training_model.named_parameters() if p.requires_grad]
    parts.append(str(getattr(run.data, "shape", "")))
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


# How many steps of an epoch are measured at least: in the first epoch of a strategy, so that one whose steps differ is
# found out; when other parameters learn; once steps are known to differ, from each other or from the last epoch's.
FIRST, OTHERS, VARYING = 4, 2, 8
# And at most, unless the strategy asks for more.
MOST = 16
# What the standard error of an epoch's mean cost may be, as a share of the mean, for the cost to be known.
KNOWN = 0.02


@dataclass
class Stretch:
    """Steps of an epoch for which the same measured steps stand.

    Attributes:
        first: index of its first step.
        costs: of those of its steps that were measured.
    """

    first: int
    costs: list[StepCost] = field(default_factory=list)


class Costs:
    """What the steps of each epoch cost.

    Without strategies one step is measured for each set of parameters that learn. With them some randomly drawn steps
    of every epoch are: a strategy may change what a step costs without freezing anything. Where all cost the same, one
    is enough; where they differ, more are measured until the mean is known. Where a strategy asks for it
    (`Run.remeasure`), the next step is measured, and the epoch's cost is put together from both stretches.

    Args:
        every: measure all steps.
    """

    def __init__(self, every: bool = False) -> None:
        self.every = every
        # The steps that were measured last with each set of parameters.
        self._known: dict[str, list[StepCost]] = {}
        self._varies = False
        # Whether a strategy has ever asked for a measurement.
        self._asked = False
        self._key = ""
        self._steps = 0
        self._stretches = [Stretch(0)]
        self._drawn: set[int] = set()
        self._least = 0
        self._generator = torch.Generator()

    def begin(self, key: str, steps: int, seed: int, strategies: bool) -> None:
        """Draw the steps of a new epoch that may be measured; `wants` says at each of them whether it is.

        Args:
            key: of what learns.
            steps: of the epoch.
            seed: of the draw, which touches no other random state.
            strategies: whether the run has any.
        """
        new = key not in self._known
        self._key, self._steps, self._stretches = key, steps, [Stretch(0)]
        self._generator.manual_seed(seed)
        # The optimizer makes its state in the first step of all.
        second = min(1, steps - 1)
        if not strategies:
            self._least, self._drawn = 1, {second} if new else set()
            return
        self._least = OTHERS if new else 1
        if self._varies:
            self._least = VARYING
        self._drawn = self._some_of(second, steps)
        if self._asked:
            # What it asked for in the middle of the last epoch says nothing of this one's beginning.
            self._drawn.add(0)
        if not self._known:
            self._least = FIRST
            # For the steps before the one at which a strategy asks.
            self._drawn.add(second)

    def _some_of(self, first: int, steps: int) -> set[int]:
        """Indices of steps from `first` on, at random; at least half of them stay for the clock."""
        later = torch.randperm(max(1, steps - first), generator=self._generator) + first
        return set(later[: max(1, min(MOST, (steps - first + 1) // 2))].tolist())

    def anew(self, index: int) -> None:
        """A strategy asks for a measurement: what was measured in this epoch stands for the steps before this one."""
        self._asked = True
        if index == 0:
            return  # each epoch is measured by itself
        self._stretches.append(Stretch(index))
        self._known.pop(self._key, None)
        self._least = VARYING if self._varies else 1
        self._drawn = self._some_of(index, self._steps) | {index}

    def wants(self, index: int) -> bool:
        """Whether the epoch's step of this index is to be measured."""
        if self.every:
            return True
        if index not in self._drawn:
            return False
        costs = self._stretches[-1].costs
        if len(costs) < self._least:
            return True
        if not self._varies:
            return False
        flops = [float(cost.flops) for cost in costs]
        error = statistics.stdev(flops) / math.sqrt(len(flops))
        return error > KNOWN * statistics.fmean(flops)

    @contextmanager
    def metered(self, run: Run, *batch: Any) -> Iterator[None]:
        """Measure the step that runs in the block."""
        with Meter(run.model, run.training_model, run.optimizer, *tree_leaves(batch)) as meter:
            yield
        assert meter.cost is not None
        self._note(meter.cost)

    def _note(self, cost: StepCost) -> None:
        costs = self._stretches[-1].costs
        self._varies = self._varies or any(other.flops != cost.flops for other in costs)
        # A strategy that asks says itself when its steps cost something else.
        before = [] if self._asked else self._known.get(self._key, [])
        if self._varies or any(other.flops != cost.flops for other in before):
            self._least = VARYING
        costs.append(cost)
        self._known[self._key] = list(costs)

    def row(self) -> dict[str, float]:
        """The epoch's `cost/…`, as far as it was measured; the peak is the highest of a step.

        Where steps differ, `cost/flops_interval` is the half-width of the 95 % interval of the epoch's FLOPs.
        """
        known = self._known.get(self._key)
        if not known:
            return {}
        row = dict.fromkeys(("cost/forward_flops", "cost/backward_flops", "cost/bytes_moved"), 0.0)
        variance, peaks = 0.0, []
        ends = [stretch.first for stretch in self._stretches[1:]] + [self._steps]
        for stretch, end in zip(self._stretches, ends, strict=True):
            costs, steps = stretch.costs or known, end - stretch.first
            row["cost/forward_flops"] += _mean([cost.forward_flops for cost in costs]) * steps
            row["cost/backward_flops"] += _mean([cost.backward_flops for cost in costs]) * steps
            row["cost/bytes_moved"] += _mean([cost.bytes_moved for cost in costs]) * steps
            half = mean_interval([float(cost.flops) for cost in costs])[1]
            if half > 0:
                variance += (half * steps) ** 2
            peaks += [cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes is not None]
        if variance:
            row["cost/flops_interval"] = math.sqrt(variance)
        if peaks:
            row["cost/peak_memory_bytes"] = max(peaks)
        return row

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        known = {key: [asdict(cost) for cost in costs] for key, costs in self._known.items()}
        return {"known": known, "varies": self._varies, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._known = {key: [StepCost(**cost) for cost in costs] for key, costs in state["known"].items()}
        self._varies, self._asked = state["varies"], state["asked"]


def _mean(values: list[int]) -> float:
    """Their mean; a whole number where all are the same, which no division can blur."""
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)
