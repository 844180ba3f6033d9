"""How an arm looks: one colour, line style and marker, the same in every figure.

Plain training is grey everywhere, the method that a figure is about is blue, and plain training of the same cost and
placebos have a tone each. The others take the next tone of `TONES`; line style and marker tell apart without colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Line = Literal["-"] | tuple[float, tuple[float, ...]]

# Told apart by people with any colour vision, on white and in print: Okabe and Ito, with three of Paul Tol's (muted).
TONES = ("#0072b2", "#d55e00", "#009e73", "#56b4e9", "#882255", "#999933", "#332288")
METHOD = TONES[0]
PLAIN, EQUAL, PLACEBO = "#595959", "#c78500", "#cc79a7"
# What an arm without the method is called where nobody says it.
_PLAIN_NAMES = {"baseline", "conventional", "plain", "plain training", "full learning"}
_LINES: tuple[Line, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)),
    (0, (4, 1, 4, 1, 1, 1)),
)
_MARKERS = "osD^vPX<>"

# Places in the two rows above, which are 8 and 9 long: no pair of line and marker comes twice among 72 arms.
_FIRST = {METHOD: 0, PLAIN: 1, EQUAL: 2, PLACEBO: 3}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn.

    Attributes:
        colour: as matplotlib takes it.
        line: the line's style.
        marker: the points' shape.
    """

    colour: str
    line: Line = "-"
    marker: str = "o"


def tones(count: int) -> list[str]:
    """So many colours in a fixed order, seven of which nobody confuses; from the eighth on they repeat."""
    return [TONES[number % len(TONES)] for number in range(count)]


class Looks:
    """The arms of one process, each with its look.

    Example:
        >>> looks = Looks()
        >>> looks.bind(plain=["float32"], method=["8 bits"])
        >>> looks["float32"].colour == PLAIN, looks["8 bits"].colour == METHOD
        (True, True)
        >>> looks["8 bits · equal flops"].colour == EQUAL
        True
    """

    def __init__(self) -> None:
        self._known: dict[str, Look] = {}

    def bind(
        self, plain: Iterable[str] = (), method: Iterable[str] = (), others: Iterable[str | Sequence[str]] = ()
    ) -> None:
        """Say what arms are, before the first of them is drawn; without it they take their looks in the order seen.

        Args:
            plain: trained or computed without the method.
            method: what the figures are about.
            others: in the order of their tones; names in a sequence of their own share one.
        """
        for colour, names in ((PLAIN, plain), (METHOD, method)):
            for name in names:
                self._known[name] = self._next(colour)
        for given in others:
            shared = [given] if isinstance(given, str) else list(given)
            tone = self._rarest()
            for name in shared:
                self._known[name] = self._next(tone)

    def __getitem__(self, arm: str) -> Look:
        """The look of an arm; one that is seen first takes the next."""
        if arm not in self._known:
            self._known[arm] = self._new(str(arm))
        return self._known[arm]

    def of(self, arms: Sequence[str]) -> dict[str, Look]:
        """The looks of several arms, in their order."""
        return {arm: self[arm] for arm in dict.fromkeys(arms)}

    def _new(self, arm: str) -> Look:
        if arm in _PLAIN_NAMES:
            return self._next(PLAIN)
        if arm.endswith(" · placebo"):
            return self._next(PLACEBO)
        if " · equal " in arm:
            return self._next(EQUAL)
        return self._next(self._rarest())

    def _rarest(self) -> str:
        """The tone that fewest arms have."""
        count = {tone: sum(look.colour == tone for look in self._known.values()) for tone in TONES}
        return min(TONES, key=lambda tone: count[tone])

    def _next(self, colour: str) -> Look:
        colours = [look.colour for look in self._known.values()]
        number = _FIRST.get(colour, -1)
        if number < 0 or colour in colours:
            number = len(_FIRST) + len(colours)
        return Look(colour, _LINES[number % len(_LINES)], _MARKERS[number % len(_MARKERS)])


LOOKS = Looks()
bind = LOOKS.bind
look = LOOKS.__getitem__
looks = LOOKS.of
