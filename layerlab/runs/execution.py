"""Running a notebook with papermill, and saying truthfully whether it is done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from layerlab.base.errors import LayerlabError, Refused, first_line
from layerlab.base.files import write_json
from layerlab.base.folder_lock import HELD, AtWork, folder_lock
from layerlab.base.names import ATTEMPT
from layerlab.base.text import as_json
from layerlab.base.usage import USED
from layerlab.runs import tracking
from layerlab.runs.answer import ANSWERS, read_answers
from layerlab.runs.jobs import import_papermill, quiet_papermill
from layerlab.runs.notebook_file import kernel_for, prepared, read_notebook
from layerlab.runs.own_folder import OwnFolder
from layerlab.runs.record import DIFFERS, OUTPUT, RECORD, RERUN, read_record, workbook_folder
from layerlab.show.progress import say

if TYPE_CHECKING:
    from layerlab.runs.jobs import Job


class NotebookFailed(LayerlabError):
    """A cell failed, or the notebook ended without its claims: more than bad input, and it has a traceback."""


class DeadKernel(LayerlabError):
    """The kernel is gone without an error in a cell: out of memory, or killed. The same job again goes on."""


def execute(job: Job, wait: bool = False, rerun: str | None = None) -> None:
    """Run a job in this process.

    What counts as done is the study's own record, not papermill's word: a dead kernel or a `sys.exit` leaves a
    notebook that papermill calls completed. The executed notebook has the suffix `.partial.ipynb` until then.

    Args:
        wait: for whoever is at work in the folder; otherwise that is an error.
        rerun: leave it at that if the job is done (by whoever was waited for, say); with the id of a batch that does
            everything anew, if that batch did it, and begin anew what another began. None: run it, or go on with it,
            in any case.

    Raises:
        DeadKernel: the kernel is gone.
        NotebookFailed: a notebook that failed or ended without its claims, naming the file with the traceback.
        LayerlabError: bad input, found here or in the notebook; another run in the same folder; a folder with files
            that layerlab did not write and would replace.
    """
    folder = Path(job.folder)
    _check_writable(folder)
    with folder_lock(folder, -1 if wait else 0, say), quiet_papermill():
        OwnFolder(folder).take(job.file.name)
        if rerun is not None:
            if job.is_done(rerun):
                job.rename_partial()
                return
            if rerun and read_record(folder).get("rerun", rerun) != rerun:
                close_runs(job)
                (folder / RECORD).unlink()
        job.failed.unlink(missing_ok=True)
        (folder / _ANSWERS_FILE).unlink(missing_ok=True)
        if not job.strategy:
            (folder / RECORD).unlink(missing_ok=True)
        begin = time.monotonic()
        _run(job, rerun or "")
        if not job.strategy:
            write_json(folder / RECORD, {
                "finished": True, "basis": job.basis, "used": _read_used(folder),
                "parameters": as_json(job.changed), "rerun": rerun or "",
                "seconds": round(time.monotonic() - begin, 1), "answers": _read_said(folder),
            })
        record = read_record(folder)
        if not record.get("finished"):
            raise fail(job, "ended before its claims were written")
        os.replace(job.partial, job.file)
        if job.strategy:
            box = tracking.Outbox(folder, job.strategy, f"the notebook of {job.label}", f"{record['attempt']}-notebook",
                                  {}, record["mlflow_run"], record.get("artifacts"))
            box.add(file=job.file.name)
            box.send(last=True)


def _run(job: Job, rerun: str) -> None:
    """Let papermill execute a job's notebook, and raise what became of it; see `execute`."""
    papermill = import_papermill()
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from layerlab.runs.papermill_engine import keep_keys

    keep_keys()
    folder = Path(job.folder)
    environment = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "LAYERLAB_HOME": str(workbook_folder()),
                   HELD: str(folder.resolve()), USED: str(folder / _USED_FILE), RERUN: rerun,
                   DIFFERS: json.dumps(as_json(job.differs or job.changed)), ANSWERS: ""}
    parameters = dict(job.changed)
    killed = out_of_memory_kills()
    _prepare(job, environment)
    if job.strategy:
        environment[OUTPUT] = job.folder
        parameters = {"profile": job.profile, **parameters}
    else:
        # A paper's study writes its answer into the record itself.
        environment[ANSWERS] = str(folder / _ANSWERS_FILE)
    try:
        papermill.execute_notebook(
            _plain(job.partial), _plain(job.partial), parameters, engine_name="layerlab", progress_bar=False,
            environment=environment, cwd=job.cwd or None,
            # The kernel listens on this machine only; its warning about that would stand between the bars.
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as raised:
        error = _unexpected(job, raised)
        if error is None:
            return
        if error.ename == Refused.__name__ or (error.ename == LayerlabError.__name__ and not _trained(folder)):
            # Bad input that only the notebook could see: its sentence says everything.
            close_runs(job)
            job.partial.unlink(missing_ok=True)
            raise LayerlabError(error.evalue) from None
        ran_out = _NO_MEMORY.search(f"{error.ename}: {error.evalue}") or out_of_memory_kills() > killed
        peak = _memory(killed) if ran_out else ""
        raise fail(job, f"failed in cell {error.exec_count} ({error.ename}: {error.evalue}{peak})") from None
    except CellTimeoutError as error:
        raise fail(job, f"ran out of a cell's time ({first_line(error)})") from None
    except DeadKernelError as error:
        raise DeadKernel(
            f"The notebook of {job.name!r} lost its kernel ({first_line(error).rstrip('.')}{_memory(killed)}); run the "
            "same command again, and it goes on from its last finished epoch."
        ) from None


def _read_used(folder: Path) -> dict[str, Any]:
    """What the kernel says that its cells used; nothing where it has no layerlab, or is not Python's."""
    file = folder / _USED_FILE
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}
    finally:
        file.unlink(missing_ok=True)


def _read_said(folder: Path) -> list[dict[str, Any]]:
    """What the sessions of a notebook answered, for its record."""
    file = folder / _ANSWERS_FILE
    answers = read_answers(file)
    file.unlink(missing_ok=True)
    return [answer.model_dump() for answer in answers]


def _prepare(job: Job, environment: dict[str, str]) -> None:
    """Write what papermill is to execute into the folder, and put the notebook's own folder on its Python's path.

    Raises:
        LayerlabError: no notebook, or no kernel for it.
    """
    notebook = Path(job.notebook)
    content = read_notebook(notebook)
    kernel = kernel_for(notebook, content, job.kernel)
    if kernel.notice:
        say(kernel.notice)
    write_json(job.partial, prepared(content, kernel.name, notebook))
    # As in Jupyter, where a notebook's folder is the one that it runs in.
    path = [str(notebook.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)


def _unexpected(job: Job, raised: Any) -> Any:
    """The first error of a cell that does not announce it by the tag `raises-exception`; None where all do.

    Papermill raises for those, too, once the notebook has run to its end as nbclient lets it, and marks it as failed.
    """
    try:
        content = read_notebook(job.partial)
    except LayerlabError:
        return raised
    cells = [cell for cell in content["cells"] if _MARKER not in cell["metadata"].get("tags", ())]
    announced = False
    for cell in cells:
        errors = [output for output in cell.get("outputs", ()) if output["output_type"] == "error"]
        if errors and _EXPECTED in cell["metadata"].get("tags", ()):
            announced = True
        elif errors:
            return SimpleNamespace(exec_count=cell["execution_count"], ename=errors[0]["ename"],
                                   evalue=errors[0]["evalue"])
        elif cell["metadata"].get("papermill", {}).get("exception"):
            return raised
    if not announced:
        return raised
    write_json(job.partial, {**content, "cells": cells})
    return None


def _plain(path: Path) -> str:
    """A path for papermill, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def out_of_memory_kills() -> int:
    """How many processes the system has killed so far because memory ran out; 0 where it does not count them."""
    counts = 0
    for file, name in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError):
            words = dict(line.split() for line in Path(file).read_text().splitlines())
            counts += int(words.get(name, 0))
    return counts


def _memory(killed_before: int) -> str:
    """What a kernel that has ended took at its peak, and whether the system ran out of memory meanwhile.

    Args:
        killed_before: what `out_of_memory_kills` gave when it began.
    """
    # In kilobytes on Linux; of the largest child that has ended, which is the kernel.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return f"; it took up to {peak / 1e9:.2f} GB{killed_for_memory(killed_before)}"


def killed_for_memory(killed_before: int) -> str:
    """That the system has run out of memory since then, with the remedy, to follow what happened; or nothing.

    Args:
        killed_before: what `out_of_memory_kills` gave then.
    """
    if out_of_memory_kills() <= killed_before:
        return ""
    return (", and the system ran out of memory and killed a process: run fewer notebooks at once (--workers), or take "
            "a smaller batch")


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
            try:
                tracking.end_open_runs(job.strategy, record["mlflow_run"], status)
            except Exception as error:  # whatever MLflow raises where its database is away
                say(f"The runs of {job.name} stay open in MLflow ({first_line(error)}); the next process that tracks "
                    "anything closes them.")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LayerlabError(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another with --output."
        ) from None


_USED_FILE, _ANSWERS_FILE = ".used.json", ".answers.json"
# Errors of Python, NumPy and CUDA by their type; of torch's memory on the CPU, C++ and the system by what they say.
_NO_MEMORY = re.compile(r"MemoryError|OutOfMemory|can't allocate memory|bad_alloc|Cannot allocate memory")
# Tags: of a cell that may raise, and of the cells by which papermill points to an error.
_EXPECTED, _MARKER = "raises-exception", "papermill-error-cell-tag"
# Errors that mean this run has nothing to clean up in a folder: another run has it, there is none, or none of ours.
_NOT_OURS = (AtWork, FileNotFoundError, PermissionError)
