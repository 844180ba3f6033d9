"""Mean and 95 % interval over seeds, and numbers as texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


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


_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def spread(mean: float, half: float = math.nan) -> str:
    """`97.21 ± 0.40`: to two digits of the half-width; the mean alone where there is none, and — for NaN."""
    if not math.isfinite(mean):
        return "—"
    if math.isfinite(half) and half > 1e-9 * abs(mean):
        decimals = min(4, max(0, 1 - math.floor(math.log10(half))))
        return f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return f"{mean:,.0f}" if abs(mean) >= 999.95 else f"{mean:#.4g}"


def scale(values: Iterable[float], unit: str) -> tuple[float, str]:
    """(factor, unit with a prefix) that make the largest of the values a number below 1000."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for prefix, size in _PREFIXES:
        if largest >= size:
            return 1 / size, prefix + unit
    return 1.0, unit
