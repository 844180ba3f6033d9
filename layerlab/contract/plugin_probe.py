"""Whether plugins import: `layerlab list` starts `python -m layerlab.contract.plugin_probe`.

Each import runs in its own process, so a plugin cannot affect the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO

from layerlab.base.processes import end_marked
from layerlab.contract.registry import Plugin

LIMIT = 60.0  # seconds that a plugin has for its import
# Variable by which the processes of a look are known.
MARK = "LAYERLAB_PROBE"


def import_errors(plugins: Sequence[Plugin], limit: float = LIMIT) -> list[str]:
    """Why each plugin cannot be used, or an empty string, in their order.

    Args:
        plugins: of the registry.
        limit: seconds that each of them has.
    """
    if not plugins:
        return []
    command = [sys.executable, "-m", "layerlab.contract.plugin_probe", str(limit)]
    asked = json.dumps([asdict(each) for each in plugins])
    mark = uuid.uuid4().hex
    try:
        process = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True,
                                 env={**os.environ, MARK: mark})
    finally:
        # Managers and daemons that a plugin starts in sessions of their own.
        end_marked(MARK, mark)
    return json.loads(process.stdout)


def main() -> None:
    """Read plugins as JSON, write their errors as JSON."""
    # Before the first fork, so that it is imported once.
    import layerlab.contract.strategy  # noqa: F401

    plugins = [Plugin(**each) for each in json.load(sys.stdin)]
    print(json.dumps([_tried(plugin, float(sys.argv[1])) for plugin in plugins]))


def _tried(plugin: Plugin, limit: float) -> str:
    answer, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        # A session of its own, so that what it may have started ends with it; what it prints is of no interest.
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        # The line's end, since a process that the plugin forks keeps the pipe open.
        os.write(told, json.dumps(plugin.broken).encode() + b"\n")
        os._exit(0)
    os.close(told)
    with os.fdopen(answer, "rb") as stream:
        in_time = _ended(child, stream, limit)
        text = stream.readline() if select.select([stream], [], [], 0)[0] else b""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text:
        return json.loads(text)
    if not in_time:
        return f"it did not import within {limit:g} s"
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"its import ended the process with {how}"


def _ended(child: int, answer: IO[bytes], limit: float) -> bool:
    """Whether a process has answered or ended before its time is over; what it forked may hold the pipe open."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if select.select([answer], [], [], 0.05)[0]:
            return True
        # Looks without taking its status away.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
    return False


if __name__ == "__main__":
    main()
