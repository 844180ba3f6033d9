"""Running a notebook with papermill, and saying truthfully whether it is done."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerlab import tracking
from layerlab.errors import LayerlabError, LayerlabWarning, first_line, reason, unknown
from layerlab.files import write_json
from layerlab.papers import load_paper
from layerlab.parameters import reproduce_command
from layerlab.study import OUTPUT, RECORD, default_folder, is_finished, notebook_key, read_record


class NotebookFailed(LayerlabError):
    """A cell failed, or the notebook ended without its claims: more than bad input, and it has a traceback."""


class DeadKernel(LayerlabError):
    """The kernel is gone without an error in a cell: out of memory, or killed. The same job again goes on."""


@dataclass(frozen=True)
class Job:
    """A notebook with its parameters, and where its results go. Plain data, so that it travels to other processes.

    Attributes:
        notebook: the notebook's file.
        folder: the output folder, a job's own.
        strategy, profile: of a paper's notebook; empty for any other.
        parameters: the values that differ from the profile's, or from the notebook's own.
        key: changes when the job would do something else, see `layerlab.study.notebook_key`.
        cores: threads that it should have; `all` keeps the machine to itself.
        memory_gb: host memory that it may take, in 10⁹ bytes.
        problem: why it cannot be run, found before anything started; otherwise empty.
    """

    notebook: str
    folder: str
    strategy: str = ""
    profile: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    cores: int | Literal["all"] = 1
    memory_gb: float = 2.0
    problem: str = ""

    @property
    def name(self) -> str:
        """The strategy's name, or the notebook's."""
        return self.strategy or Path(self.notebook).stem

    @property
    def label(self) -> str:
        """Name, profile and the parameters that differ, in a few words."""
        changed = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return " ".join(part for part in (self.name, self.profile, changed) if part)

    @property
    def command(self) -> str:
        """What runs this job alone."""
        more = []
        if self.strategy and Path(self.folder) != default_folder(
            self.strategy, self.profile, self.parameters
        ).resolve():
            more = ["--output", self.folder]
        return reproduce_command(self.strategy or self.notebook, self.profile if self.strategy else "",
                                 self.parameters, *more)

    @property
    def file(self) -> Path:
        """The executed notebook of a finished job."""
        return Path(self.folder) / f"{self.name}.ipynb"

    @property
    def partial(self) -> Path:
        """The notebook while it runs, and after an interruption."""
        return self.file.with_suffix(".partial.ipynb")

    @property
    def failed(self) -> Path:
        """The notebook of a failed job, with its traceback."""
        return self.file.with_suffix(".failed.ipynb")

    @property
    def last_seconds(self) -> float | None:
        """How long it took when it last finished; the last session alone, if it had been interrupted."""
        return read_record(Path(self.folder)).get("seconds")

    def is_done(self, since: float = 0.0) -> bool:
        """Whether the folder holds this very job, finished, by our own record; papermill's word is no proof.

        Args:
            since: what was finished before does not count, in seconds since 1970.
        """
        folder = Path(self.folder)
        record = read_record(folder)
        if record.get("ended", 0.0) < since:
            return False
        if self.strategy:
            return is_finished(folder, self.key)
        return bool(record.get("finished")) and record.get("key") == self.key and self.file.exists()

    def settle(self) -> None:
        """Give a done job's notebook its name, if it was killed between the study's last word and that: only the saving
        of the last cell is lost."""
        if not self.file.exists() and self.partial.exists():
            os.replace(self.partial, self.file)


def paper_job(
    strategy: str, profile: str = "quick", parameters: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Job:
    """The notebook of an installed strategy's paper.

    Args:
        strategy: name of an installed strategy.
        profile: one of its paper's.
        parameters: notebook parameters that override the profile's.
        output: the folder for notebook, tables, figures and claims. Default: `runs/<strategy>/<profile>`.

    Raises:
        LayerlabError: no such strategy, profile or parameter.
    """
    paper = load_paper(strategy)
    chosen = paper.profile(profile)
    given = dict(parameters or {})
    known = set(chosen.parameters)
    for name in given:
        if name not in known:
            raise unknown(f"parameter of the {strategy} notebook", name, known)
    # As the study has them that its notebook opens.
    values = json.loads(json.dumps({**chosen.parameters, **given}, default=str))
    folder = Path(output) if output else default_folder(strategy, profile, given)
    return Job(
        str(paper.notebook_file), str(folder.resolve()), strategy, profile, given,
        notebook_key(paper.notebook_file, values, paper.folder), chosen.cores, chosen.memory_gb,
    )


def notebook_parameters(notebook: Path) -> list[str]:
    """Names of the parameters of a notebook, from its cell tagged `parameters`.

    Raises:
        LayerlabError: no such file, or no notebook.
    """
    papermill = _papermill()
    if not notebook.is_file():
        raise LayerlabError(f"There is no notebook {notebook}; check the path.")
    try:
        with _quiet_papermill():
            return list(papermill.inspect_notebook(str(notebook)))
    except Exception as error:  # whatever nbformat, papermill and JSON raise on what is no notebook
        raise LayerlabError(f"{notebook} is no notebook that can be read ({error}); check the file.") from None


def notebook_job(
    notebook: str | Path, parameters: Mapping[str, Any] | None = None, output: str | Path | None = None
) -> Job:
    """Any notebook with a cell tagged `parameters`.

    Raises:
        LayerlabError: no such file, no notebook, or no such parameter.
    """
    file = Path(notebook).resolve()
    given = dict(parameters or {})
    known = notebook_parameters(file)
    for name in given:
        if name not in known:
            raise unknown(f"parameter of {file.name}", name, known)
    name = file.stem
    if file.parent != tracking.workbook_folder() / "notebooks":
        # Several may be called alike.
        name += "-" + hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    folder = Path(output) if output else default_folder("notebooks", name, given)
    return Job(str(file), str(folder.resolve()), parameters=given, key=notebook_key(file, given))


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
    papermill = _papermill()
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    folder = Path(job.folder)
    _check_writable(folder)
    wanted = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "LAYERLAB_HOME": str(tracking.workbook_folder())}
    parameters = dict(job.parameters)
    if job.strategy:
        wanted[OUTPUT] = job.folder
        parameters = {"profile": job.profile, **parameters}
    begin = time.monotonic()
    with _alone(folder, wait), _quiet_papermill():
        if since is not None:
            if job.is_done(since):
                job.settle()
                return
            if read_record(folder).get("begun", since) < since:
                close_runs(job)
                (folder / RECORD).unlink()
        job.failed.unlink(missing_ok=True)
        if not job.strategy:
            (folder / RECORD).unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                job.notebook, job.partial, parameters, engine_name="layerlab", progress_bar=False,
                environment=wanted,
                # The kernel listens on this machine only; its warning about that would stand between the bars.
                extra_arguments=["--IPKernelApp.log_level=40"],
            )
        except papermill.PapermillExecutionError as error:
            if error.ename == LayerlabError.__name__:
                # Bad input that only the notebook could see: its sentence is all that there is to say.
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
        if not job.strategy:
            write_json(folder / RECORD, {
                "finished": True, "key": job.key, "parameters": job.parameters,
                "seconds": round(time.monotonic() - begin, 1), "ended": time.time(),
            })
        record = read_record(folder)
        if not record.get("finished"):
            raise fail(job, "ended before its claims were written")
        os.replace(job.partial, job.file)
        if job.strategy:
            tracking.log_file(record["mlflow_run"], job.file.read_bytes(), job.file.name, record.get("artifacts", ""))


def fail(job: Job, what: str) -> NotebookFailed:
    """Keep a failed job's notebook and close its runs; gives the error back for the caller to raise.

    What another run that is at work in the folder has there stays as it is.

    Args:
        what: it did, in words that follow its name: `ran out of its time`.
    """
    where = ""
    with contextlib.suppress(*_NOT_OURS), _alone(Path(job.folder)):
        close_runs(job)
        if job.partial.exists():
            os.replace(job.partial, job.failed)
            where = f"; its traceback is in {job.failed}"
    return NotebookFailed(f"The notebook of {job.name!r} {what}{where}.")


def close_runs(job: Job, status: Literal["FAILED", "KILLED"] = "FAILED") -> None:
    """Close the MLflow runs of a job that will not close them itself, unless another run is at work in its folder and
    goes on with them."""
    folder = Path(job.folder)
    with contextlib.suppress(*_NOT_OURS), _alone(folder):
        record = read_record(folder)
        if job.strategy and record.get("mlflow_run") and not record.get("finished"):
            tracking.end_open_runs(job.strategy, record["mlflow_run"], status)


def _papermill() -> Any:
    """papermill, without what costs each process two seconds and without what is plugged into it and broken.

    It imports jsonschema, which builds a grammar of web addresses if the package that holds it can be imported.
    Notebooks are valid or not without that. And it loads engines of all distributions with nothing around that.
    """
    if "papermill" in sys.modules:
        import papermill

        return papermill
    import entrypoints

    name = "rfc3987_syntax"
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]
    every = entrypoints.get_group_all
    entrypoints.get_group_all = _sound_points
    try:
        import papermill
    finally:
        entrypoints.get_group_all = every
        if absent:
            del sys.modules[name]
    return papermill


def _sound_points(group: str) -> list[Any]:
    """The entry points of a group that can be loaded; the others get a warning."""
    sound = []
    for point in importlib.metadata.entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # whatever somebody's module raises
            owner = point.dist.name if point.dist else "a package"
            warnings.warn(f"What {owner} plugs into papermill ({point.name}) is left out: {reason(error)}.",
                          LayerlabWarning, stacklevel=2)
        else:
            sound.append(point)
    return sound


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LayerlabError(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another with --output."
        ) from None


class _AtWork(LayerlabError):
    """Another run is at work in a folder."""


# Why there is nothing of one's own to put away in a folder: another run's, none, or one that was never written in.
_NOT_OURS = (_AtWork, FileNotFoundError, PermissionError)
_mine: set[Path] = set()


@contextlib.contextmanager
def _alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """Only one run at a time in a folder.

    Args:
        wait: for another one to end.

    Raises:
        _AtWork: another one is at work, and is not waited for.
    """
    if folder in _mine:
        yield
        return
    with open(folder / ".lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise _AtWork(
                        f"Another run is at work in {folder}; wait for it, or choose another folder with --output."
                    ) from None
                time.sleep(0.3)
        _mine.add(folder)
        try:
            yield
        finally:
            _mine.remove(folder)


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    logger = logging.getLogger("papermill")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
