"""One notebook in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from layerlab.base.errors import LayerlabError
from layerlab.base.processes import end_marked
from layerlab.base.text import as_json
from layerlab.runs.batch.notebook_process import STOP, TIME
from layerlab.runs.batch.runners import Runner, started_anew
from layerlab.runs.execution import fail, killed_for_memory, out_of_memory_kills
from layerlab.runs.jobs import Job
from layerlab.show.progress import VARIABLE, followed

Tell = Callable[[dict[str, Any]], None]
Start = Callable[[Mapping[str, str], Path], tuple[Runner, int]]
Status = Literal["finished", "done before", "failed", "refused", "stopped"]
GRACE = 15.0  # seconds that a runner has for ending its kernel and closing its runs


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: `finished`; `done before`, when there was nothing to do; `failed`; `refused` for bad input that only
            the notebook could see, a folder that cannot be written, or a job that came with a problem; `stopped` by a
            person.
        message: one sentence, for a failure; what was compared, for what was done before.
    """

    status: Status
    message: str = ""


class Stop:
    """Whether to stop: `asked` ends cleanly, `now` kills."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.now = threading.Event()


def run_job(
    job: Job,
    environment: Mapping[str, str],
    tell: Tell,
    stop: Stop,
    *,
    time_limit: float | None = None,
    retries: int = 2,
    rerun: str = "",
    start: Start = started_anew,
) -> Outcome:
    """Run one job in a process of its own, and again if that or its kernel dies.

    Args:
        environment: variables for the notebook's kernel.
        tell: takes the notebook's progress.
        stop: looked at a few times a second.
        time_limit: seconds.
        retries: for a dead kernel or runner; an error in a cell is not tried again.
        rerun: the id of a batch that does everything anew; empty: what is done is done.
        start: starts the process, see `Runners.start`.
    """
    for left in range(retries, -1, -1):
        if stop.asked.is_set():
            return Outcome("stopped")
        # Looked up each time: a runner may have died after its notebook's last word, and dask gives a dead worker's
        # jobs to another one although they were finished.
        state = job.state(rerun)
        if state.done:
            job.rename_partial()
            return Outcome("done before", state.why)
        status, message = _once(job, environment, tell, stop, time_limit, rerun, start)
        if status == "finished":
            return Outcome("finished")
        if status != "dead":
            return Outcome(status, message)
        if stop.asked.is_set():
            return Outcome("stopped")
        if left:
            tell({"again": message})
    try:
        return Outcome("failed", str(fail(job, f"died {retries + 1} times (the last time: {message.rstrip('.')})")))
    except LayerlabError as error:
        return Outcome("failed", str(error))


def _once(
    job: Job, environment: Mapping[str, str], tell: Tell, stop: Stop, time_limit: float | None, rerun: str,
    start: Start,
) -> tuple[Status | Literal["dead"], str]:
    with tempfile.TemporaryDirectory(prefix="layerlab-", ignore_cleanup_errors=True) as temporary:
        events, log = Path(temporary) / "progress.jsonl", Path(temporary) / "log"
        events.touch()
        killed = out_of_memory_kills()
        process, channel = start({**environment, VARIABLE: str(events)}, log)
        told = _tell_process(process, json.dumps({"job": as_json(asdict(job)), "rerun": rerun}))
        deadline = time.monotonic() + time_limit if time_limit else float("inf")
        end = float("inf")
        with followed(events, tell):
            while told and process.poll() is None:
                now = time.monotonic()
                if end == float("inf") and (stop.asked.is_set() or now > deadline):
                    _tell_process(process, STOP if stop.asked.is_set() else TIME)
                    end = now + GRACE
                if now > end or stop.now.is_set():
                    _kill(process, events)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        if not told:
            _kill(process, events)
        status = process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if outcome := _answer(channel):
            return outcome
        _kill(process, events)
        if stop.asked.is_set():
            return "stopped", ""
        if end < float("inf"):
            return "failed", str(fail(job, "ran out of its time and had to be killed"))
        return "dead", _last_words(status, log) + killed_for_memory(killed)


def _answer(channel: int) -> tuple[Status | Literal["dead"], str] | None:
    """How a runner that has ended says that its job ended; None if it died before its last word."""
    with os.fdopen(channel, encoding="utf-8") as stream, contextlib.suppress(ValueError):
        outcome = json.loads(stream.readline())
        return outcome["status"], outcome["message"]
    return None


def _tell_process(process: Runner, line: str) -> bool:
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _kill(process: Runner, events: Path) -> None:
    """End a runner, its kernel and all that the cells have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    end_marked(VARIABLE, str(events))


def _last_words(status: int, log: Path) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"its process {how}" + (f" ({lines[-1][:200]})" if lines else "")
