"""Mean and 95 % interval over seeds, and numbers as texts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


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
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, quantile(n) * deviation / math.sqrt(n)


def quantile(count: int) -> float:
    """How many standard errors the 95 % interval of the mean of `count` values reaches to each side, by Student's t.

    Example:
        >>> round(quantile(3), 3)
        4.303
    """
    # Not scipy.stats, whose import takes half a second more.
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


# A hyphen in the place of a sign: before a number, and after nothing, a space or a bracket.
_HYPHEN = re.compile(r"(?<![^\s(\[])-(?=\.?\d)")
# A space within a number with its interval and unit.
_WITHIN = re.compile(r"(?<=\d) (?=[±%×]|points\b)|(?<=±) ")
_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def spread(mean: float, half: float = math.nan) -> str:
    """`97.21 ± 0.40`: to two digits of the half-width; the mean alone where there is none, and — for NaN."""
    if not math.isfinite(mean):
        return "—"
    if math.isfinite(half) and half > 1e-9 * abs(mean):
        decimals = min(4, max(0, 1 - math.floor(math.log10(half))))
        return f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return f"{mean:,.0f}" if abs(mean) >= 999.95 else f"{mean:#.4g}"


def with_minus(text: str) -> str:
    """A text to be read, with minus signs before its numbers; names, dates and powers of ten keep their hyphens.

    Example:
        >>> with_minus("gpu-2, 3 seeds: -0.40 ± 0.10 (of 2026-11-27)")
        'gpu-2, 3 seeds: −0.40 ± 0.10 (of 2026-11-27)'
    """
    return _HYPHEN.sub("−", text)


def unbroken(text: str, space: str = "\N{NO-BREAK SPACE}") -> str:
    """A text in which no line ends within a number with its interval and unit.

    Args:
        text: of any length.
        space: that stands in the place of such a number's own.

    Example:
        >>> unbroken("less by 0.40 ± 0.10 points", "_")
        'less by 0.40_±_0.10_points'
    """
    return _WITHIN.sub(space, text)


def signed(interval: tuple[float, float]) -> str:
    """A difference, (mean, half-width), with its sign: `+0.80 ± 0.30`."""
    text = spread(*interval)
    return text if text.startswith(("-", "—")) else f"+{text}"


@dataclass(frozen=True)
class Estimate:
    """A quantity measured once for each seed: its mean with the 95 % interval.

    A value that is not finite did not happen with its seed; then mean and interval are not finite either.

    Attributes:
        values: one for each seed.
        unit: of the values, such as `points`, `%` or `×`.

    Example:
        >>> from layerlab import Estimate
        >>> gain = Estimate((1.0, 1.5, 1.25), "points")
        >>> print(gain)
        1.25 ± 0.62 points
        >>> gain.low > 0
        True
    """

    values: tuple[float, ...]
    unit: str = ""

    @cached_property
    def interval(self) -> tuple[float, float]:
        """(mean, half-width of the 95 % interval)."""
        if not all(math.isfinite(value) for value in self.values):
            return math.nan, math.nan
        return mean_interval(self.values)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return self.interval[0]

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; NaN for one seed."""
        return self.interval[1]

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half

    @property
    def reached(self) -> Estimate:
        """The seeds in which it happened."""
        return Estimate(tuple(value for value in self.values if math.isfinite(value)), self.unit)

    def __str__(self) -> str:
        return f"{spread(self.mean, self.half)} {self.unit}".strip()


def scale(values: Iterable[float], unit: str) -> tuple[float, str]:
    """(factor, unit with a prefix) that make the largest of the values a number below 1000."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for prefix, size in _PREFIXES:
        if largest >= size:
            return 1 / size, prefix + unit
    return 1.0, unit
