"""One process at a time in a folder: a file lock that the system frees when its process ends, in whatever way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from layerlab.base.errors import LayerlabError

NAME = ".layerlab.lock"
# Names the folder that the process which started this one has locked for it.
HELD = "LAYERLAB_LOCKED"
# Seconds from one look at a lock to the next.
POLL = 0.1


class AtWork(LayerlabError):
    """Another process is at work in a folder."""


@contextmanager
def folder_lock(folder: Path, wait: float = 0.0, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes out of a folder; the process that has it may enter again.

    Args:
        folder: an existing folder.
        wait: seconds to wait for another process; -1: until it ends.
        tell: takes a sentence, if there is somebody to wait for.

    Raises:
        AtWork: another process is at work there, and did not end in time.
        OSError: the folder cannot be written.
    """
    lock = _lock(folder)
    try:
        acquire_lock(lock, wait, f"Another run is at work in {folder}", tell)
    except Timeout:
        raise AtWork(f"Another run is at work in {folder}; wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()


def acquire_lock(lock: BaseFileLock, wait: float, why: str, tell: Callable[[str], None] | None) -> None:
    """Take a lock, and say who has it where that is somebody else.

    Args:
        wait: seconds; -1: until it is free.
        why: the beginning of the sentence.
        tell: takes the sentence.

    Raises:
        Timeout: it is not free in time.
    """
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)
        return
    if tell is not None and wait:
        holder = lock_holder(Path(lock.lock_file))
        tell(f"{why}{f' (process {holder})' if holder else ''}; waiting for it.")
    lock.acquire(timeout=wait, poll_interval=POLL)


def lock_holder(file: Path) -> int:
    """The process that holds a lock of a file, as the kernel lists it; 0 where that cannot be told.

    Example:
        >>> from pathlib import Path
        >>> lock_holder(Path("/no/such/file"))
        0
    """
    try:
        wanted = str(file.stat().st_ino)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return 0
    # 1: FLOCK ADVISORY WRITE 1234 fe:01:5678 0 EOF; of one that waits, an arrow stands before the kind.
    for words in (line.split() for line in lines):
        if len(words) > 5 and words[1] != "->" and words[5].rpartition(":")[2] == wanted:
            return max(0, int(words[4]))
    return 0


def keep_locked(folder: Path, wait: float) -> None:
    """As `folder_lock`, until this process ends; the process that started this one may hold the folder for it."""
    if os.environ.get(HELD) == str(folder):
        return
    held = folder_lock(folder, wait)
    held.__enter__()
    _kept.append(held)


_kept: list[object] = []


def _lock(folder: Path) -> FileLock:
    # One object for each file, which counts how often this process has entered.
    return FileLock(folder.resolve() / NAME, is_singleton=True, thread_local=False)
