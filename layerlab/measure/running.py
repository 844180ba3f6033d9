"""Seconds in which this process ran: those in which it was stopped do not count."""

from __future__ import annotations

import os
import threading
import time

# Seconds from one look at the clock to the next; without a look for so long, and nearly without work, a process stood.
TICK, LONGEST, WORK = 1.0, 10.0, 0.1


class _Running:
    """Looks at the clock once a tick, which a process that stands still cannot do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stood = 0.0
        self._watched = False
        self._look = self._worked = 0.0

    def now(self) -> float:
        """Seconds, from no particular moment on."""
        with self._lock:
            now, worked = time.perf_counter(), time.process_time()
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._tick, daemon=True).start()
            else:
                gap = now - self._look
                # A call that lets no other thread run works; a process that was stopped does not.
                if gap > LONGEST and worked - self._worked < WORK * gap:
                    self._stood += gap - TICK
            self._look, self._worked = now, worked
            return now - self._stood

    def _tick(self) -> None:
        while True:
            time.sleep(TICK)
            self.now()


_clock = _Running()
# A fork has no thread of its parent's, and perhaps a lock that it held; Windows has no forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _Running.__init__(_clock))


def running() -> float:
    """A clock in seconds, as `time.perf_counter`, that stands still while this process is stopped.

    It knows that from a thread that looks at the clock once a second. A gap of over ten seconds in which the process
    did next to nothing counts as standing still, but for its last second, in which it may have run.

    Example:
        >>> start = running()
        >>> running() - start < 1
        True
    """
    return _clock.now()
