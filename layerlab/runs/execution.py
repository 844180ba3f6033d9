"""Running a notebook with papermill, and saying truthfully whether it is done."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layerlab.base.errors import LayerlabError, Refused, first_line
from layerlab.base.files import write_json
from layerlab.base.folder_lock import HELD, AtWork, folder_lock
from layerlab.base.names import ATTEMPT
from layerlab.runs import tracking
from layerlab.runs.jobs import import_papermill, quiet_papermill
from layerlab.runs.record import OUTPUT, RECORD, read_record, workbook_folder

if TYPE_CHECKING:
    from layerlab.runs.jobs import Job


class NotebookFailed(LayerlabError):
    """A cell failed, or the notebook ended without its claims: more than bad input, and it has a traceback."""


class DeadKernel(LayerlabError):
    """The kernel is gone without an error in a cell: out of memory, or killed. The same job again goes on."""


def execute(job: Job, wait: bool = False, since: float | None = None) -> None:
    """Run a job in this process.

    What counts as done is the study's own record, not papermill's word: a dead kernel or a `sys.exit` leaves a
    notebook that papermill calls completed. The executed notebook has the suffix `.partial.ipynb` until then.

    Args:
        wait: for whoever is at work in the folder; otherwise that is an error.
        since: leave it at that if the job was finished after that time (by whoever was waited for, say), and begin
            anew what was begun before; None: run it, or go on with it, in any case.

    Raises:
        DeadKernel: the kernel is gone.
        NotebookFailed: a notebook that failed or ended without its claims, naming the file with the traceback.
        LayerlabError: bad input, found here or in the notebook; another run in the same folder.
    """
    folder = Path(job.folder)
    _check_writable(folder)
    with folder_lock(folder, -1 if wait else 0), quiet_papermill():
        if since is not None:
            if job.is_done(since):
                job.rename_partial()
                return
            if read_record(folder).get("begun", since) < since:
                close_runs(job)
                (folder / RECORD).unlink()
        job.failed.unlink(missing_ok=True)
        if not job.strategy:
            (folder / RECORD).unlink(missing_ok=True)
        begin = time.monotonic()
        _run(job)
        if not job.strategy:
            write_json(folder / RECORD, {
                "finished": True, "key": job.key, "parameters": job.changed,
                "seconds": round(time.monotonic() - begin, 1), "ended": time.time(),
            })
        record = read_record(folder)
        if not record.get("finished"):
            raise fail(job, "ended before its claims were written")
        os.replace(job.partial, job.file)
        if job.strategy:
            tracking.log_file(record["mlflow_run"], job.file.read_bytes(), job.file.name, record.get("artifacts", ""))


def _run(job: Job) -> None:
    """Let papermill execute a job's notebook, and raise what became of it; see `execute`."""
    papermill = import_papermill()
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    folder = Path(job.folder)
    environment = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "LAYERLAB_HOME": str(workbook_folder()),
                   HELD: str(folder.resolve())}
    parameters = dict(job.changed)
    if job.strategy:
        environment[OUTPUT] = job.folder
        parameters = {"profile": job.profile, **parameters}
    try:
        papermill.execute_notebook(
            job.notebook, job.partial, parameters, engine_name="layerlab", progress_bar=False, environment=environment,
            # The kernel listens on this machine only; its warning about that would stand between the bars.
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == Refused.__name__ or (error.ename == LayerlabError.__name__ and not _trained(folder)):
            # Bad input that only the notebook could see: its sentence says everything.
            close_runs(job)
            job.partial.unlink(missing_ok=True)
            raise LayerlabError(error.evalue) from None
        raise fail(job, f"failed in cell {error.exec_count} ({error.ename}: {error.evalue})") from None
    except CellTimeoutError as error:
        raise fail(job, f"ran out of a cell's time ({first_line(error)})") from None
    except DeadKernelError as error:
        raise DeadKernel(
            f"The notebook of {job.name!r} lost its kernel ({error}); run the same command again, and it goes on "
            "from its last finished epoch."
        ) from None


def _trained(folder: Path) -> bool:
    """Whether a fit has begun in a folder: what goes wrong from then on is no bad input."""
    return any((folder / "checkpoints").rglob(ATTEMPT))


def fail(job: Job, what: str) -> NotebookFailed:
    """Keep a failed job's notebook and close its runs; gives the error back for the caller to raise.

    What another run that is at work in the folder has there stays as it is.

    Args:
        what: it did, in words that follow its name: `ran out of its time`.
    """
    where = ""
    with contextlib.suppress(*_NOT_OURS), folder_lock(Path(job.folder)):
        close_runs(job)
        if job.partial.exists():
            os.replace(job.partial, job.failed)
            where = f"; its traceback is in {job.failed}"
    return NotebookFailed(f"The notebook of {job.name!r} {what}{where}.")


def close_runs(job: Job, status: Literal["FAILED", "KILLED"] = "FAILED") -> None:
    """Close the MLflow runs of a job that will not close them itself, unless another run is at work in its folder and
    goes on with them."""
    folder = Path(job.folder)
    with contextlib.suppress(*_NOT_OURS), folder_lock(folder):
        record = read_record(folder)
        if job.strategy and record.get("mlflow_run") and not record.get("finished"):
            tracking.end_open_runs(job.strategy, record["mlflow_run"], status)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LayerlabError(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another with --output."
        ) from None


# Errors that mean this run has nothing to clean up in a folder: another run has it, there is none, or none of ours.
_NOT_OURS = (AtWork, FileNotFoundError, PermissionError)
