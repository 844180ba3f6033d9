"""Main memory: how much of it this process may still take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

# Where Linux shows control groups of its first and second version, and the files in which a group's limit, what it
# takes, and how much of that is a cache which goes when room is wanted stand.
_FIRST = (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes of main memory that are free: of the machine, or of a container's share where that is less."""
    free = [limit - used for limit, used in _shares()]
    return max(0, min([psutil.virtual_memory().available, *free]))


def memory_limit() -> int | None:
    """Bytes that this process and those beside it may take together, if that is less than the machine has."""
    least = min((limit for limit, _ in _shares()), default=None)
    return least if least is not None and least < psutil.virtual_memory().total else None


def _shares() -> Iterator[tuple[int, int]]:
    """The limit of each control group that this process is in, and what the group takes of it, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, limit, used, cache = _FIRST if controllers else _SECOND
            own = root / name.strip("/")
            # In a container the group's own name may not be there; its limit stands at the root then.
            for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
                # A group without a limit says so in a word, the root in no file at all.
                with contextlib.suppress(OSError, ValueError, KeyError):
                    most = int((folder / limit).read_text())
                    status = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    yield most, int((folder / used).read_text()) - int(status[cache])
