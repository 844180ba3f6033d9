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
        # As if nothing else were known: what another method's figures bind changes nothing.
        own = Looks()
        for colour, names in ((PLAIN, plain), (METHOD, method)):
            for name in names:
                own._known[name] = own._next(colour)
        for given in others:
            tone = own._rarest(())
            for name in [given] if isinstance(given, str) else given:
                own._known[name] = own._next(tone)
        self._known |= own._known

    def __getitem__(self, arm: str) -> Look:
        """The look of an arm; one that is seen first takes the next."""
        return self.of([arm])[arm]

    def of(self, arms: Sequence[str]) -> dict[str, Look]:
        """The looks of several arms, in their order; those that are seen first differ in colour from the others."""
        names = list(dict.fromkeys(arms))
        for arm in names:
            if arm not in self._known:
                beside = [self._known[name] for name in names if name in self._known]
                self._known[arm] = self._next(self._colour(arm, beside))
        return {arm: self._known[arm] for arm in names}

    def _colour(self, arm: str, beside: Sequence[Look]) -> str:
        if arm in _PLAIN_NAMES:
            return PLAIN
        if arm.endswith(" · placebo"):
            return PLACEBO
        if " · equal " in arm:
            return EQUAL
        return self._rarest(beside)

    def _rarest(self, beside: Sequence[Look]) -> str:
        """The tone that fewest of the arms in the figure have, and of these tones the one that fewest have at all."""
        def how_often(tone: str) -> tuple[int, int]:
            return (sum(look.colour == tone for look in beside),
                    sum(look.colour == tone for look in self._known.values()))

        return min(TONES, key=how_often)

    def _next(self, colour: str) -> Look:
        """A look with a marker that no other of its colour has, nor any other with its line."""
        known = self._known.values()
        number = _FIRST.get(colour, -1)
        if number < 0 or any(look.colour == colour for look in known):
            number = len(_FIRST) + len(known)
        for further in range(len(_LINES) * len(_MARKERS)):
            line, marker = _LINES[(number + further) % len(_LINES)], _MARKERS[(number + further) % len(_MARKERS)]
            if not any((look.marker == marker and look.colour == colour) or (look.line, look.marker) == (line, marker)
                       for look in known):
                break
        return Look(colour, line, marker)


LOOKS = Looks()
bind = LOOKS.bind
look = LOOKS.__getitem__
looks = LOOKS.of
