"""A sign of life below a notebook's first cell: how long it has been loading, until it trains or ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

# As `layerlab.show.progress` has it: whoever runs the notebook shows by itself that it is at work.
VARIABLE = "LAYERLAB_PROGRESS"
_at_work: _Loading | None = None
_was = False


class _Loading:
    """Seconds that count up below the running cell of a kernel.

    Args:
        shell: IPython's, of the kernel.
    """

    def __init__(self, shell: Any) -> None:
        from IPython.display import display

        self._shell = shell
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._shown = display(self._text(), raw=True, display_id=True)
        shell.events.register("post_run_cell", self._cell_has_ended)
        threading.Thread(target=self._tick, daemon=True).start()

    def _text(self) -> dict[str, str]:
        return {"text/plain": f"loading: {time.monotonic() - self._begin:.0f} s"}

    def _tick(self) -> None:
        while not self._stop.wait(1):
            self._shown.update(self._text(), raw=True)

    def _cell_has_ended(self, *_: Any) -> None:
        end()

    def end(self) -> None:
        """Take the line away."""
        self._stop.set()
        self._shell.events.unregister("post_run_cell", self._cell_has_ended)
        self._shown.update({"text/plain": ""}, raw=True)


def begin() -> None:
    """Show that the running cell is at work, in a notebook that a person runs and once; elsewhere nothing."""
    global _at_work, _was
    if _was or "ipykernel" not in sys.modules or VARIABLE in os.environ:
        return
    _was = True
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        _at_work = _Loading(shell)


def end() -> None:
    """Show it no longer: something else is shown, or something is measured, from which a thread would take time."""
    global _at_work
    if _at_work is not None:
        ending, _at_work = _at_work, None
        ending.end()
