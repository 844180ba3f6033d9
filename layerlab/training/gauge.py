"""What an epoch takes: seconds without those of measuring, FLOPs, bytes, peak memory, joules."""

from __future__ import annotations

import hashlib
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


def learning_key(run: Run) -> str:
    """A digest of what learns: names and shapes of the parameters with gradients, and the batch's shape."""
    parts = [f"{name}{tuple(p.shape)}" for name, p in run.training_model.named_parameters() if p.requires_grad]
    parts.append(str(getattr(run.data, "shape", "")))
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


class Costs:
    """What a step costs, measured once for each set of parameters that learn."""

    def __init__(self) -> None:
        self._known: dict[str, StepCost] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    @contextmanager
    def metered(self, key: str, run: Run, *batch: Any) -> Iterator[None]:
        """Measure the step that runs in the block."""
        with Meter(run.model, run.training_model, run.optimizer, *tree_leaves(batch)) as meter:
            yield
        assert meter.cost is not None
        self._known[key] = meter.cost

    def row(self, key: str, steps: int) -> dict[str, float]:
        """An epoch's `cost/…` of so many steps, as far as it was measured; the peak is a step's."""
        cost = self._known.get(key)
        if cost is None:
            return {}
        row: dict[str, float] = {
            "cost/forward_flops": cost.forward_flops * steps,
            "cost/backward_flops": cost.backward_flops * steps,
            "cost/bytes_moved": cost.bytes_moved * steps,
        }
        if cost.peak_memory_bytes is not None:
            row["cost/peak_memory_bytes"] = cost.peak_memory_bytes
        return row

    def state_dict(self) -> dict[str, dict[str, int | None]]:
        """For a checkpoint."""
        return {key: asdict(cost) for key, cost in self._known.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        self._known = {key: StepCost(**cost) for key, cost in state.items()}


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
