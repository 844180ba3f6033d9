"""Which process writes a run, told apart from all others of this machine and of the past."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path


@cache
def this_machine() -> str:
    """This machine as far as process numbers mean anything: host, boot and namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return f"{socket.gethostname()}/{boot}/{space}"


def _process(number: int) -> str:
    """A process, told apart from a later one of the same number by its start; empty if there is none."""
    try:
        # After the name, which may hold anything, comes a parenthesis; the 20th field from there is the start.
        started = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{this_machine()}:{number}:{started}"


def this_process() -> str:
    """This process as the writer of runs."""
    return _process(os.getpid())


def is_alive(writer: str) -> bool:
    """Whether a writer of runs, as `this_process` names it, is a process of this machine that has not ended."""
    number = writer.split(":")[-2:-1]
    return bool(number) and _process(int(number[0])) == writer
