"""The words in which a method is held against plain training of the same cost and against its placebo, the same in a
paper's sentence and in the answer for a network of one's own."""

from __future__ import annotations

import math

from layerlab.show.interval import signed, spread, with_minus

Interval = tuple[float, float]
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


def over(points: Interval, what: str) -> str:
    """What the points above something mean, where `better` and `worse` are said of whole intervals.

    Example:
        >>> over((-0.1, 0.4), EQUAL)
        'not measurably better than plain training of the same cost (−0.10 ± 0.40 points)'
    """
    mean, half = points
    if mean == 0 and half == 0:
        return f"the same as {what} with every seed"
    if not math.isfinite(half):
        return f"{points_text(points)} against {what}, with one seed"
    if mean - half > 0:
        return f"better than {what} ({points_text(points)})"
    if mean + half < 0:
        return f"worse than {what} ({points_text(points)})"
    return f"not measurably better than {what} ({points_text(points)})"


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
