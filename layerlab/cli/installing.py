"""Run a command that is silent for minutes, and show every second that it is at work: `installing.py FOLDER COMMAND`.

`make` runs it with the system's Python before anything is installed, so that it imports nothing but Python's own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

# Seconds between two lines where there is no terminal.
_LINES = 10


def waited(folder: Path, command: list[str]) -> int:
    """Run a command with its own output, and tell every second how long it has been and how much of the disk it took.

    Args:
        folder: on the disk that the command writes to; an existing one.
        command: with its arguments.

    Returns:
        The command's exit status.
    """
    terminal = sys.stderr.isatty()
    begin, free = time.monotonic(), shutil.disk_usage(folder).free
    told = begin
    with subprocess.Popen(command) as process:
        while True:
            try:
                status = process.wait(1)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if terminal or now - told >= _LINES:
                    told = now
                    taken = max(0, free - shutil.disk_usage(folder).free)
                    text = f"installing: {now - begin:.0f} s, {taken / 1e9:.1f} GB"
                    # A terminal's line is written over by the next one.
                    print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr,
                          flush=True)
            except KeyboardInterrupt:
                process.terminate()
                status = 130
                break
            else:
                break
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(waited(Path(sys.argv[1]), sys.argv[2:]))
