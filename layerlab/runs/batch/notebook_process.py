"""One notebook in its own process: `layerlab.runs.batch` starts `python -m layerlab.runs.batch.notebook_process`.

The job comes as one JSON line on standard input. The outcome goes as one JSON line to the file descriptor that the
first argument numbers: a pipe that no kernel inherits, since cells write anything to standard output. Standard input
stays open as long as whoever started this lives: its end, or a line with a reason, ends the kernel and this process,
so that no kernel outlives a batch that was killed. Nothing that a cell has started outlives the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading

from layerlab.base.errors import LayerlabError, reason, refusal
from layerlab.base.processes import end_marked
from layerlab.base.text import from_json
from layerlab.runs.execution import DeadKernel, NotebookFailed, close_runs, execute, fail
from layerlab.runs.jobs import Job
from layerlab.show.progress import VARIABLE

STOP = "stop"
TIME = "time"


def main() -> None:
    """Run the job, and say how it ended: finished, failed, refused (bad input), dead (the kernel), or stopped."""
    channel = int(sys.argv[1])
    os.set_inheritable(channel, False)
    # Whoever starts a batch in the background has it ignore the interrupt, and this process waits for its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = json.loads(sys.stdin.readline())
    job = Job(**from_json(spec["job"]))
    reasons: list[str] = []
    threading.Thread(target=_watch, args=(reasons,), daemon=True).start()
    status, message = "finished", ""
    try:
        execute(job, wait=True, rerun=spec["rerun"])
    except DeadKernel as error:
        status, message = "dead", str(error)
    except NotebookFailed as error:
        status, message = "failed", str(error)
    except LayerlabError as error:
        status, message = "refused", str(error)
    except KeyboardInterrupt:
        status = "stopped"
    except Exception as error:  # a full disk in the middle of papermill, for one
        status, message = "failed", str(fail(job, f"could not be run ({refusal(error) or reason(error)})"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if reasons and status != "finished":
        # The kernel was ended from here, whatever that looked like to papermill.
        status, message = "stopped", ""
        if reasons[0] == TIME:
            status, message = "failed", str(fail(job, "ran out of its time"))
        else:
            close_runs(job, "KILLED")
    end_marked(VARIABLE, os.environ[VARIABLE])
    with os.fdopen(channel, "w") as answer, contextlib.suppress(BrokenPipeError):
        answer.write(json.dumps({"status": status, "message": message}) + "\n")


def _watch(reasons: list[str]) -> None:
    """Wait for a reason to stop; then the kernel goes first, so that nothing waits for a cell that hangs."""
    reasons.append(sys.stdin.readline().strip() or STOP)
    end_marked(VARIABLE, os.environ[VARIABLE])
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
