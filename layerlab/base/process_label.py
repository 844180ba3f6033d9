"""What the system shows of a process that was forked and not started anew: its command line and its environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def relabel(words: Sequence[str], variable: str, value: str) -> None:
    """Have the system show this process as one that was started with a command line and a variable of that value.

    `ps` and whoever looks for processes by what they were started with see a fork as they see its parent. Linux shows
    both from the process's own memory, so that is changed; what this process forks looks the same.

    Args:
        words: the command line; no longer than that of the process that was forked.
        variable: of the environment that the forked process was started with.
        value: as long as the one that stands there.

    Raises:
        OSError: not Linux, no right to write there, or no room.
    """
    status = Path("/proc/self/stat").read_text()
    # After the name, which may hold anything, comes a parenthesis, then the third field of proc(5); these are 48 to 51.
    arguments, arguments_end, environment, environment_end = map(int, status.rpartition(")")[2].split()[45:49])
    line = b"".join(word.encode() + b"\0" for word in words)
    if len(line) > arguments_end - arguments:
        raise OSError(f"a command line has room for {arguments_end - arguments} characters, not {len(line)}")
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        block = os.pread(memory, environment_end - environment, environment)
        name = f"{variable}=".encode()
        place = 0 if block.startswith(name) else block.index(b"\0" + name) + 1
        new = name + value.encode() + b"\0"
        if block.find(b"\0", place) + 1 != place + len(new):
            raise OSError(f"${variable} has room for a text of another length than {value!r}")
        os.pwrite(memory, new, environment + place)
        os.pwrite(memory, line.ljust(arguments_end - arguments, b"\0"), arguments)
    except ValueError:
        raise OSError(f"the process was started without ${variable}") from None
    finally:
        os.close(memory)
