"""The words in which a method is held against plain training of the same cost and against its placebo, the same in a
paper's sentence and in the answer for a network of one's own."""

from __future__ import annotations

import math
from typing import Literal

from layerlab.show.interval import signed, spread, with_minus

Interval = tuple[float, float]
# Open: the interval includes zero. One seed has no interval.
Standing = Literal["better", "worse", "open", "one seed"]
EQUAL, PLACEBO = "plain training of the same cost", "its placebo"


def points_text(points: Interval, sign: bool = True) -> str:
    """`+0.80 ± 0.30 points`; to two decimals where there is no interval.

    Args:
        points: (mean, half-width of the 95 % interval).
        sign: write the plus of a gain.
    """
    mean, half = points
    if math.isfinite(half) and half > 0:
        text = signed(points) if sign else spread(*points)
    else:
        text = f"{mean:{'+' if sign else ''}.2f}"
    return f"{with_minus(text)} points"


def standing(points: Interval) -> Standing:
    """What the points above something mean, of whole intervals.

    Example:
        >>> standing((-0.1, 0.4)), standing((1.0, 0.4))
        ('open', 'better')
    """
    mean, half = points
    if not math.isfinite(half):
        return "one seed"
    if mean - half > 0:
        return "better"
    return "worse" if mean + half < 0 else "open"


def over(points: Interval, what: str) -> str:
    """The same in words.

    Example:
        >>> over((-0.1, 0.4), EQUAL)
        'not measurably better than plain training of the same cost (−0.10 ± 0.40 points)'
    """
    mean, half = points
    if mean == 0 and half == 0:
        return f"the same as {what} with every seed"
    stands = standing(points)
    if stands == "one seed":
        return f"{points_text(points)} against {what}, with one seed"
    return f"{'not measurably better' if stands == 'open' else stands} than {what} ({points_text(points)})"


def over_placebo(points: Interval, above: bool) -> str:
    """The same of an arm that pays and its placebo, with what follows from it.

    Args:
        points: (mean, half-width of the 95 % interval) of the arm above its placebo.
        above: whether it is proven to be above.

    Example:
        >>> over_placebo((1.0, 0.4), True)
        'it beats its placebo (+1.00 ± 0.40 points)'
    """
    told = f"({points_text(points)})"
    if above:
        return f"it beats {PLACEBO} {told}"
    return f"it is not measurably above {PLACEBO} {told}, so its decisions may add nothing to what it saves"
