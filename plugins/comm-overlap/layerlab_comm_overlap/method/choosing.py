"""Which way of averaging gradients is the fastest on this link and for this network, found in the first steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

MARGIN = 0.02
"""Share of a step by which a technique has to beat DistributedDataParallel as it comes."""
# Steps of a visit. DDP makes its buckets anew after the first, and the order of segments is decided after four.
_WARM, _TIMED = 5, 4
VISIT = _WARM + _TIMED
"""Steps of a visit; an epoch has to be longer."""
_ROUNDS = 2


@dataclass(frozen=True)
class Way:
    """A way of averaging gradients.

    Attributes:
        bucket_mb: mebibytes of gradients in a bucket.
        techniques: 1, 2 and 3 on or off; None: DistributedDataParallel as it comes.
    """

    bucket_mb: float
    techniques: tuple[bool, bool, bool] | None = None

    @property
    def name(self) -> str:
        """As tables have it, such as `1 + 2, 5 MB buckets`."""
        on = [str(number) for number, each in enumerate(self.techniques or (), 1) if each]
        what = "DDP" if self.techniques is None else " + ".join(on) or "no overlap"
        return f"{what}, {self.bucket_mb:g} MB buckets"


class Choice:
    """Visits all ways by turns, some steps each and twice, and then stays with the fastest.

    All workers visit the same way in the same step, and decide by the means over all of them. A visit that an epoch's
    end would cut short waits for the next epoch.

    Args:
        ways: to choose from; the first is where it begins.
        device: of tensors that the workers can sum.

    Attributes:
        way: the present one.
        over: whether it is decided.
    """

    def __init__(self, ways: Sequence[Way], device: torch.device) -> None:
        self.ways = list(ways)
        self.way = self.ways[0]
        self.over = len(self.ways) == 1
        self._device = device
        self._seconds: dict[Way, list[float]] = {way: [] for way in self.ways}
        # Plain values, since a result travels to another process with its strategies.
        self._left = [way for number in range(_ROUNDS) for way in (ways if number % 2 == 0 else reversed(ways))][1:]
        self._steps = 0
        self._since = 0.0

    def before_step(self, left: int) -> bool:
        """To be called before each step, with everything that was sent still under way.

        Args:
            left: steps of the epoch, this one included.

        Returns:
            Whether `way` has changed.
        """
        whole = left > VISIT
        if self.over or (self._steps == 0 and not whole):
            return False
        if self._steps < VISIT:
            if self._steps == _WARM:
                self._since = time.perf_counter()
            self._steps += 1
            return False
        self._seconds[self.way].append((time.perf_counter() - self._since) / _TIMED)
        before, self.way = self.way, self._left.pop(0) if self._left else self._decide()
        # This step is the first of the next visit, if that can end in this epoch.
        self._steps = int(whole)
        return self.way != before

    def interrupt(self) -> None:
        """The epoch is over, or the network has changed: begin the present visit again."""
        self._steps = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Name of a way → seconds a step, median over its visits, once it is decided the mean over all workers."""
        return {way.name: statistics.median(values) for way, values in self._seconds.items() if values}

    def _decide(self) -> Way:
        medians = [statistics.median(self._seconds[way]) for way in self.ways]
        means = torch.tensor(medians, dtype=torch.float64, device=self._device)
        dist.all_reduce(means)
        means /= dist.get_world_size()
        self._seconds = {way: [mean] for way, mean in zip(self.ways, means.tolist(), strict=True)}
        self.over = True
        return fastest({way: values[0] for way, values in self._seconds.items()})


def fastest(seconds: dict[Way, float]) -> Way:
    """The way to stay with: the fastest, but DDP as it comes where nothing beats it by more than `MARGIN`.

    Args:
        seconds: of a step.

    Example:
        >>> from layerlab_comm_overlap.method.choosing import Way, fastest
        >>> fastest({Way(25): 1.0, Way(1, (True, True, False)): 0.99}).name
        'DDP, 25 MB buckets'
    """
    best = min(seconds, key=lambda way: seconds[way])
    stock = min((way for way in seconds if way.techniques is None), key=lambda way: seconds[way], default=best)
    return best if seconds[best] < (1 - MARGIN) * seconds[stock] else stock
