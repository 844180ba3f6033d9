"""Does a strategy beat plain training of the same cost?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerlab.show.interval import Estimate, signed, with_minus


@dataclass(frozen=True)
class Pays:
    """A strategy against plain training that costs as much, its whole schedule included.

    Attributes:
        points: of top-1 that the strategy is above that training, one for each seed; or how much lower its loss is.
        length: how long that training is, as a share of the baseline's steps.

    Example:
        >>> from layerlab import Estimate, Pays
        >>> print(Pays(Estimate((-0.5, -0.6, -0.7), "points"), 0.51))
        pays: no (−0.60 ± 0.25 points against training 51 % as long)
    """

    points: Estimate
    length: float

    @property
    def verdict(self) -> Literal["yes", "no", "undecided"]:
        """`yes` where the whole 95 % interval is above zero, `no` where it is below; one seed is `undecided`."""
        if self.points.low > 0:
            return "yes"
        if self.points.high < 0:
            return "no"
        return "undecided"

    def __str__(self) -> str:
        points = f"{with_minus(signed(self.points.interval))} {self.points.unit}"
        seeds = ", one seed" if len(self.points.values) == 1 else ""
        return f"pays: {self.verdict} ({points} against training {100 * self.length:.0f} % as long{seeds})"
