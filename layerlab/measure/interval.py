"""Mean and 95 % interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval) of independent values, by Student's t.

    The half-width of a single value is NaN: one seed says nothing about its spread.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    if max(values) == min(values):
        return mean, 0.0
    from scipy import stats  # half a second, which one seed does without

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
