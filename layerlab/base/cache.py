"""The folder of what layerlab can make again, and what it makes of single files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

# Files that changed less than so many seconds ago may change again within one tick of the file system's clock.
SETTLED = 2.0
# A temporary file of another machine is given up after so many seconds.
_ABANDONED = 86_400.0


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
            write_cached(memory, lambda stream: stream.write(f"{head}{made}\n".encode()))
    return made


def write_cached(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file of the cache whole or not at all; nothing of it is left where that fails, or where a writer died.

    Unlike `layerlab.base.files.write_atomically` it does not wait for the disk: what is lost is made again.

    Args:
        file: its folder is made if there is none.
        write: is given a stream.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file.parent)
    # Who writes it is in its name, so that what a killed process left can be told from what is being written.
    part = file.with_name(f"{file.name}.{socket.gethostname()}+{os.getpid()}+{uuid.uuid4().hex[:8]}.partial")
    try:
        with part.open("wb") as stream:
            write(stream)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@cache
def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of writers that are gone; once in a process, since a folder may hold thousands."""
    for part in folder.glob("*.partial"):
        import psutil  # nothing is left by most starts

        owner = part.name.removesuffix(".partial").split("+")
        with contextlib.suppress(OSError):
            here = len(owner) == 3 and owner[0].endswith(f".{socket.gethostname()}") and owner[1].isdecimal()
            gone = here and not psutil.pid_exists(int(owner[1]))
            if gone or time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()


def _stamp(path: str) -> str:
    """Another one after each edit; empty while the next edit could leave it as it is."""
    status = os.stat(path)
    if time.time() - max(status.st_mtime, status.st_ctime) <= SETTLED:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
