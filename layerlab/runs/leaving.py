"""How a process ends that was forked from one with thousands of modules, none of which it has to take apart."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Set
from typing import NoReturn


def leave(shared: Set[str]) -> NoReturn:
    """End this process as Python ends one, but for what it shares with the process that it was forked from.

    Threads are waited for, what was registered for the exit is done, and what its own modules hold goes, so that files
    that were left open are written. Taking torch and its like apart would cost half a second.

    Args:
        shared: names of the modules that were there before the fork.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for name, module in list(sys.modules.items()):
        if name == "__main__" or not (name in shared or name.partition(".")[0] in sys.stdlib_module_names):
            vars(module).clear()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    # The buffers of C, for what a library has printed.
    ctypes.CDLL(None).fflush(None)
    os._exit(0)
