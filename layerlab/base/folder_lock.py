"""One process at a time in a folder: a file lock that the system frees when its process ends, in whatever way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from layerlab.base.errors import LayerlabError

NAME = ".layerlab.lock"
# Names the folder that the process which started this one has locked for it.
HELD = "LAYERLAB_LOCKED"
# Seconds from one look at a lock to the next.
POLL = 0.1


class AtWork(LayerlabError):
    """Another process is at work in a folder."""


@contextmanager
def folder_lock(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder; the process that has it may enter again.

    Args:
        folder: an existing folder.
        wait: seconds to wait for another process; -1: until it ends.

    Raises:
        AtWork: another process is at work there, and did not end in time.
        OSError: the folder cannot be written.
    """
    lock = _lock(folder)
    try:
        lock.acquire(timeout=wait, poll_interval=POLL)
    except Timeout:
        raise AtWork(f"Another run is at work in {folder}; wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()


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
