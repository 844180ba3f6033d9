"""What is written at an axis: every label says its tick's value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FixedLocator, Formatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

_LETTERS = (("G", 1e9), ("M", 1e6), ("k", 1e3))
# Digits behind the point, at most: beyond them a tick's own rounding would show.
_MOST = 9


class ExactFormatter(Formatter):
    """Labels that equal their ticks' values: as many digits behind the point as the ticks need, and no factor apart.

    Args:
        factor: from a tick's value to the number shown; 100 for a share in per cent.
        unit: written behind each number.
        letters: k, M and G in the place of 10³, 10⁶ and 10⁹.

    Example:
        >>> ExactFormatter(100, " %").format_ticks([0.2, 0.225, 0.25])
        ['20.0 %', '22.5 %', '25.0 %']
        >>> ExactFormatter(letters=True).format_ticks([50_000, 200_000, 1_500_000])
        ['50k', '200k', '1.5M']
    """

    def __init__(self, factor: float = 1.0, unit: str = "", letters: bool = False) -> None:
        self.factor, self.unit, self.letters = factor, unit, letters
        self._decimals = 0

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of an axis, all with the same digits behind the point; with letters, each as short as it gets."""
        self._decimals = max((_decimals(self.factor * value, self._step(values)) for value in values), default=0)
        return [self(value, place) for place, value in enumerate(values)]

    def __call__(self, value: float, pos: int | None = None) -> str:
        """The label of one tick."""
        number = self.factor * value
        letter = ""
        decimals = self._decimals
        if self.letters:
            letter, size = next(((name, size) for name, size in _LETTERS if abs(number) >= size), ("", 1.0))
            number /= size
            decimals = _decimals(number, abs(number))
        # Zero has no sign; a tick just below it is zero but for rounding.
        text = f"{round(number, decimals) + 0.0:,.{decimals}f}"
        return self.fix_minus(text) + letter + self.unit

    def _step(self, values: Sequence[float]) -> float:
        """The smallest distance between ticks, as shown."""
        places = sorted(self.factor * float(value) for value in values)
        steps = [after - before for before, after in itertools.pairwise(places) if after > before]
        return min(steps, default=max(map(abs, places), default=1.0))


def _decimals(number: float, step: float) -> int:
    """Digits behind the point that tell a number, but for the rounding of its tick."""
    if not math.isfinite(number):
        return 0
    allowed = 1e-6 * (step or 1.0)
    return next((digits for digits in range(_MOST) if abs(number - round(number, digits)) <= allowed), _MOST)


def whole(axis: Any, most: int = 8) -> None:
    """Ticks at whole numbers alone at a linear axis (`axes.xaxis`, say): epochs, workers.

    Args:
        axis: matplotlib's.
        most: ticks at most, by about one.
    """
    axis.set_major_locator(MaxNLocator(most, integer=True))
    axis.set_major_formatter(ExactFormatter())


def percent(axis: Any, most: int = 7) -> None:
    """Per cent at a linear axis whose values are shares.

    Args:
        axis: matplotlib's.
        most: ticks at most, by about one.
    """
    axis.set_major_locator(few(most))
    axis.set_major_formatter(ExactFormatter(100, "%"))


def logarithmic(axis: Any, base: float = 10, letters: bool = False) -> None:
    """A logarithmic axis with its numbers written out.

    Args:
        axis: matplotlib's.
        base: of the logarithm; ticks are at its powers, and at 1, 2 and 5 times those of ten where there are few.
        letters: k, M and G in the place of zeros.
    """
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    low, high = axis.get_view_interval()
    # Within less than a power of ten, round numbers as on a linear axis.
    narrow, short = high / low < 8, high / low < 3000
    powers = LogLocator(base, subs=(1, 2, 5) if base == 10 and short else (1,), numticks=12)
    axis.set_major_locator(few(4) if base == 10 and narrow else powers)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_LogFormatter(letters=letters))
    axis.set_minor_formatter(NullFormatter())


class _LogFormatter(ExactFormatter):
    """As `ExactFormatter`, but each label with the digits that it needs itself."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        texts = []
        for value in values:
            self._decimals = _decimals(self.factor * value, abs(self.factor * value))
            texts.append(self(value))
        return texts


def at(axis: Any, values: Sequence[float]) -> None:
    """Ticks at these values and nowhere else, a few left out where there are more than nine."""
    shown = list(values)[:: max(1, -(-len(values) // 9))]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_LogFormatter())


def few(most: int) -> MaxNLocator:
    """Round numbers at an axis, so many at most."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
