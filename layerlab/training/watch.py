"""A time limit for what a strategy does in a hook or a step, so that one that never comes back is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from layerlab.base.errors import LayerlabError

# Seconds that one hook or one step may take; `$LAYERLAB_HOOK_LIMIT` in its place.
LIMIT = 1800.0
VARIABLE = "LAYERLAB_HOOK_LIMIT"


class NeverCameBack(LayerlabError):
    """A hook or a step took longer than it may."""


def hook_limit() -> float:
    """The limit in force, in seconds."""
    return float(os.environ.get(VARIABLE) or LIMIT)


@contextmanager
def watched(progress: Callable[[], Any], where: Callable[[], str]) -> Iterator[None]:
    """Interrupt the block when nothing changes in it for longer than the limit.

    A thread looks; it costs the steps nothing. What hangs outside of Python's reach is not interrupted.

    Args:
        progress: a value that changes with each hook and each step.
        where: what is at work, in words.

    Raises:
        NeverCameBack: it says where.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        # Signals reach the main thread only, and Windows has none for this.
        yield
        return
    over, limit = threading.Event(), hook_limit()

    def give_up(number: int, frame: Any) -> None:
        raise NeverCameBack(f"{where()} did not come back within {limit:g} s; mend it, or set {VARIABLE} to the "
                            "seconds that it needs.")

    def look() -> None:
        last, since = progress(), time.monotonic()
        while not over.wait(min(1.0, limit / 4)):
            now = progress()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                os.kill(os.getpid(), signal.SIGALRM)
                return

    before = signal.signal(signal.SIGALRM, give_up)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGALRM, before)
