"""The folder of what layerlab can make again, and what it makes of single files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

# Files that changed less than so many seconds ago may change again within one tick of the file system's clock.
SETTLED = 2.0


def cache_folder() -> Path:
    """Where layerlab keeps what it can make again, such as decoded datasets: `$LAYERLAB_CACHE`, else
    `~/.cache/layerlab`."""
    return Path(os.environ.get("LAYERLAB_CACHE") or Path.home() / ".cache" / "layerlab")


def remembered(file: Path, kind: str, maker: str, make: Callable[[Path], str]) -> str:
    """What is made of a file, taken from the cache until the file is edited.

    A cache that cannot be read or written costs the time alone.

    Args:
        file: to be read.
        kind: of what is made; a name for a folder of the cache.
        maker: one word, another one where `make` would make something else.
        make: of the file, a line of text; what is empty is made again each time.

    Raises:
        OSError: there is no such file.
    """
    path = os.path.abspath(file)
    memory = cache_folder() / kind / hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    stamp = _stamp(path)
    head = f"{maker} {stamp} "
    with contextlib.suppress(OSError, ValueError):
        text = memory.read_text(encoding="utf-8")
        # The end of the line is written last.
        if text.startswith(head) and text.endswith("\n"):
            return text.removeprefix(head).removesuffix("\n")
    made = make(file)
    if made and stamp and _stamp(path) == stamp:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
            partial.write_text(f"{head}{made}\n", encoding="utf-8")
            os.replace(partial, memory)
    return made


def _stamp(path: str) -> str:
    """Another one after each edit; empty while the next edit could leave it as it is."""
    status = os.stat(path)
    if time.time() - max(status.st_mtime, status.st_ctime) <= SETTLED:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
