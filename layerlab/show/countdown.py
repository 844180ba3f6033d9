"""How long something will take still, from what its parts have taken so far."""

from __future__ import annotations

# What is measured anew may be longer than what was told by this factor and these seconds, before it is told: noise is
# no reason for a time left that grows.
_SLOWER, _SECONDS = 1.25, 2.0


class Countdown:
    """The seconds left of a work that consists of parts, such as epochs.

    Between two parts it counts down. It grows only for a reason: more parts than before, or parts that take clearly
    longer than those before them. Parts that were finished by another process are none of the measured ones: one part
    is measured between two words that something is done.

    Args:
        now: seconds of a clock that never goes back, when the work began.

    Example:
        >>> countdown = Countdown(0.0)
        >>> countdown.done(1, 4, 10.0)
        >>> countdown.left(10.0), countdown.left(15.0)
        (30.0, 25.0)
    """

    def __init__(self, now: float) -> None:
        self._begin = now
        self._measured = 0
        self._parts = 0
        self._end: float | None = None

    def done(self, finished: int, parts: int, now: float) -> None:
        """One more part is done, so that so many of so many are finished."""
        grown = parts > self._parts
        self._parts = parts
        self._measured += 1
        end = now + (now - self._begin) / self._measured * max(0, parts - finished)
        told = self._end
        if told is None or grown or end < told or end - now > _SLOWER * max(0.0, told - now) + _SECONDS:
            self._end = end

    def left(self, now: float) -> float | None:
        """Seconds; None where nothing was measured yet, and where all that was told is over."""
        return self._end - now if self._end is not None and self._end > now else None
