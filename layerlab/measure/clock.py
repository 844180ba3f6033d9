"""Seconds and joules."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from layerlab.base.arguments import validated
from layerlab.measure.running import running
from layerlab.show import alive


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


Clock = Literal["wall", "processor"]
"""What is counted: seconds that pass, or seconds that this process takes of processors."""


@dataclass(frozen=True)
class Turns:
    """Seconds of one candidate, one value a round.

    Attributes:
        seconds: per round, in order; round i of every candidate ran next to each other.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Turns) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) of self / other, round by round; of a single round, its ratio."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        return middle, low, high


@validated
def time_by_turns(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 3, device: str = "cpu",
    clock: Clock = "wall",
) -> dict[str, Turns]:
    """Time several callables in one process, one after the other in each round, in alternating order.

    Args:
        candidates: what to time, by name.
        rounds: measured rounds.
        warmup: unmeasured calls of each beforehand.
        device: waited for before and after each call.
        clock: `processor` counts what this process takes of processors, which other jobs on the machine disturb least.
    """
    alive.end()
    now = time.process_time if clock == "processor" else running
    place = torch.device(device)
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            synchronise(place)
            start = now()
            candidates[name]()
            synchronise(place)
            seconds[name].append(now() - start)
    return {name: Turns(tuple(values)) for name, values in seconds.items()}


# The counter moves every 20 to 100 ms: of less than this it would tell what another training used, or nothing.
SHORTEST = 1.0


class Energy:
    """Joules that a GPU has used since this object was made, from its own counter.

    None where it keeps none, and in the first second, for which it is too coarse.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type != "cuda":
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._since = time.monotonic()
        except pynvml.NVMLError:
            self._handle = None

    def joules(self) -> float | None:
        """Since the start."""
        if self._handle is None or time.monotonic() - self._since < SHORTEST:
            return None
        import pynvml

        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._start) / 1000
