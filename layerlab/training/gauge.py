"""What an epoch takes: seconds without those of measuring, and joules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerlab.measure.clock import Energy, synchronise
from layerlab.measure.running import running


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
        start = running()
        yield
        synchronise(self.device)
        self._hooks += running() - start

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Time all steps together: to wait for the device after each would slow them down."""
        start = running()
        yield
        synchronise(self.device)
        self._loop += running() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the step in the block out of the epoch's seconds."""
        synchronise(self.device)
        start = running()
        yield
        synchronise(self.device)
        self._aside += running() - start
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
