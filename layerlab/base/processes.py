"""The processes that a job starts: found by a variable of their environment, and ended together."""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

# Looks for processes that were started while others were being ended.
_LOOKS = 5


def import_path() -> str:
    """$PYTHONPATH for a Python that shall find the modules that this one finds."""
    return os.pathsep.join(path for path in sys.path if path)


def marked_processes(variable: str, value: str) -> list[psutil.Process]:
    """The other processes that were started with a variable of that value.

    A process hands its environment on to what it starts, also to what leaves its session and its process group, and to
    what lives on when it ends. The environment is the one of the last `exec`: a process cannot take it off.

    Args:
        variable: of the environment.
        value: one that nothing else has, such as the path of a temporary file.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
    return found


def end_marked(variable: str, value: str) -> None:
    """Kill every other process that was started with a variable of that value, and what they start meanwhile."""
    for _ in range(_LOOKS):
        found = [process for process in marked_processes(variable, value) if process.status() != psutil.STATUS_ZOMBIE]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, 1.0)
