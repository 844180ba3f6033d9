"""What an epoch takes: seconds without those of measuring, FLOPs, bytes, peak memory, joules."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from layerlab.contract.run import Run
from layerlab.measure.clock import Energy, synchronise
from layerlab.measure.cost import Meter, StepCost
from layerlab.show.interval import mean_interval


def learning_key(run: Run) -> str:
    """A digest of what learns: names and shapes of the parameters with gradients, and the batch's shape."""
    parts = [f"{name}{tuple(p.shape)}" for name, p in run.training_model.named_parameters() if p.requires_grad]
    parts.append(str(getattr(run.data, "shape", "")))
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


# How many steps of an epoch are measured at least: in the first epoch of a strategy, so that one whose steps differ is
# found out; when other parameters learn; when an epoch is not as the one before; once steps are known to differ.
FIRST, OTHERS, CHANGED, VARYING = 4, 2, 3, 8
# And at most.
MOST = 16
# What the standard error of an epoch's mean cost may be, as a share of the mean, for the cost to be known.
KNOWN = 0.02


class Costs:
    """What the steps of each epoch cost.

    Without strategies one step is measured for each set of parameters that learn. With them some randomly drawn steps
    of every epoch are: a strategy may change what a step costs without freezing anything. Where all cost the same, one
    is enough; where they differ, more are measured until the mean is known.
    """

    def __init__(self) -> None:
        # The steps that were measured last with each set of parameters.
        self._known: dict[str, list[StepCost]] = {}
        self._epoch: list[StepCost] = []
        self._least = 0
        self._varies = False

    def drawn(self, key: str, steps: int, seed: int, strategies: bool) -> set[int]:
        """Steps of a new epoch that may be measured; `wanted` says at each of them whether it is.

        Args:
            key: of what learns.
            steps: of the epoch.
            seed: of the draw, which touches no other random state.
            strategies: whether the run has any.
        """
        self._epoch = []
        new = key not in self._known
        if not strategies:
            self._least = 1
            # The optimizer makes its state in the first step of all.
            return {min(1, steps - 1)} if new else set()
        self._least = OTHERS if new else 1
        if not self._known:
            self._least = FIRST
        if self._varies:
            self._least = VARYING
        generator = torch.Generator().manual_seed(seed)
        later = torch.randperm(max(1, steps - 1), generator=generator) + min(1, steps - 1)
        # At least half of the steps stay for the clock.
        return set(later[: max(1, min(MOST, steps // 2))].tolist())

    @property
    def wanted(self) -> bool:
        """Whether another step is to be measured in this epoch."""
        if len(self._epoch) < self._least:
            return True
        if not self._varies:
            return False
        flops = [float(cost.flops) for cost in self._epoch]
        error = statistics.stdev(flops) / math.sqrt(len(flops))
        return error > KNOWN * statistics.fmean(flops)

    @contextmanager
    def metered(self, key: str, run: Run, *batch: Any) -> Iterator[None]:
        """Measure the step that runs in the block."""
        with Meter(run.model, run.training_model, run.optimizer, *tree_leaves(batch)) as meter:
            yield
        assert meter.cost is not None
        self._note(key, meter.cost)

    def _note(self, key: str, cost: StepCost) -> None:
        if any(other.flops != cost.flops for other in self._epoch):
            self._varies = True
            self._least = VARYING
        elif any(other.flops != cost.flops for other in self._known.get(key, [])):
            self._least = max(self._least, CHANGED)
        self._epoch.append(cost)
        self._known[key] = list(self._epoch)

    def row(self, key: str, steps: int) -> dict[str, float]:
        """An epoch's `cost/…` of so many steps, as far as it was measured; the peak is the highest of a step.

        Where steps differ, `cost/flops_interval` is the half-width of the 95 % interval of the epoch's FLOPs.
        """
        costs = self._known.get(key)
        if not costs:
            return {}
        row: dict[str, float] = {
            "cost/forward_flops": _mean([cost.forward_flops for cost in costs]) * steps,
            "cost/backward_flops": _mean([cost.backward_flops for cost in costs]) * steps,
            "cost/bytes_moved": _mean([cost.bytes_moved for cost in costs]) * steps,
        }
        half = mean_interval([float(cost.flops) for cost in costs])[1]
        if half > 0:
            row["cost/flops_interval"] = half * steps
        peaks = [cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes is not None]
        if peaks:
            row["cost/peak_memory_bytes"] = max(peaks)
        return row

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        known = {key: [asdict(cost) for cost in costs] for key, costs in self._known.items()}
        return {"known": known, "varies": self._varies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._known = {key: [StepCost(**cost) for cost in costs] for key, costs in state["known"].items()}
        self._varies = state["varies"]


def _mean(values: list[int]) -> float:
    """Their mean; a whole number where all are the same, which no division can blur."""
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)


class Gauge:
    """The clock and the counters of one epoch, from its making on.

    An epoch's seconds are those of its hooks and of its steps. Steps that are measured or that compile are left out,
    and count as much as the others do on average.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._hooks = self._loop = self._aside = 0.0
        self._untimed = 0
        synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._energy = Energy(device)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Time what runs before and after the steps."""
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self._hooks += time.perf_counter() - start

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Time all steps together: to wait for the device after each would slow them down."""
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self._loop += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the step in the block out of the epoch's seconds."""
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self._aside += time.perf_counter() - start
        self._untimed += 1

    def seconds(self, steps: int) -> float:
        """Of an epoch of so many steps."""
        timed = steps - self._untimed
        return self._hooks + ((self._loop - self._aside) * steps / timed if timed else self._loop)

    def joules(self) -> float | None:
        """Since the epoch's begin; None where the GPU keeps no counter."""
        return self._energy.joules()

    def allocated(self) -> int | None:
        """The most that the GPU's allocator held since the epoch's begin, in bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
