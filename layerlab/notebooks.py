"""Running a paper's notebook with papermill, and saying truthfully whether it is done."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layerlab import tracking
from layerlab.errors import LayerlabError, unknown
from layerlab.papers import ClaimResult, Paper, load_paper
from layerlab.progress import VARIABLE, Bars
from layerlab.study import OUTPUT, default_folder, read_record, read_results


def reproduce(
    strategy: str,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    show: bool = True,
    bar: int = 0,
) -> list[ClaimResult]:
    """Run the notebook of an installed strategy's paper.

    What counts as done is the study's own record, not papermill's word: a dead kernel or a `sys.exit` leaves a
    notebook that papermill calls completed. The executed notebook has the suffix `.partial.ipynb` until then.

    Args:
        strategy: name of an installed strategy.
        profile: one of its paper's.
        parameters: notebook parameters that override the profile's.
        output: the folder for notebook, tables, figures and claims. Default: `runs/<strategy>/<profile>`.
        show: progress bars on a terminal, lines elsewhere.
        bar: the line below the cursor at which the bars start.

    Returns:
        The claims' results.

    Raises:
        LayerlabError: bad input, found here or in the notebook; another run in the same folder; a notebook that failed
            or ended without its claims, naming the file with the traceback.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    paper = load_paper(strategy)
    paper.profile(profile)
    parameters = dict(parameters or {})
    check_parameters(paper, parameters)
    folder = Path(output) if output else default_folder(strategy, profile, parameters)
    folder = folder.resolve()
    _check_writable(folder)
    final = folder / f"{strategy}.ipynb"
    partial, failed = folder / f"{strategy}.partial.ipynb", folder / f"{strategy}.failed.ipynb"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(folder))
        stack.enter_context(_quiet_papermill())
        events = stack.enter_context(_environment(folder))
        stack.enter_context(_drawn(strategy, profile, events, show, bar))
        failed.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                paper.notebook_file, partial, {"profile": profile, **parameters}, progress_bar=False,
                # The kernel listens on this machine only; its warning about that would stand between the bars.
                extra_arguments=["--IPKernelApp.log_level=40"],
            )
        except papermill.PapermillExecutionError as error:
            _close_failed(folder, strategy)
            if error.ename == LayerlabError.__name__:
                # Bad input that only the notebook could see: its sentence is all that there is to say.
                partial.unlink(missing_ok=True)
                raise LayerlabError(error.evalue) from None
            os.replace(partial, failed)
            raise LayerlabError(
                f"The notebook of {strategy!r} failed in cell {error.exec_count} ({error.ename}: {error.evalue}); "
                f"its traceback is in {failed}."
            ) from None
        except DeadKernelError as error:
            raise LayerlabError(
                f"The notebook of {strategy!r} lost its kernel ({error}); run the same command again, and it goes on "
                "from its last finished epoch."
            ) from None
        record = read_record(folder)
        if not record.get("finished"):
            _close_failed(folder, strategy)
            os.replace(partial, failed)
            raise LayerlabError(f"The notebook of {strategy!r} ended before its claims were written; see {failed}.")
        os.replace(partial, final)
        tracking.log_file(record["mlflow_run"], final.read_bytes(), final.name)
    return read_results(folder)


def check_parameters(paper: Paper, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that the notebook does not have; papermill itself would only warn.

    Raises:
        LayerlabError: naming it, with those that there are.
    """
    import papermill

    with _quiet_papermill():
        known = papermill.inspect_notebook(str(paper.notebook_file))
    for name in parameters:
        if name not in known:
            raise unknown(f"parameter of the {paper.strategy} notebook", name, known)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LayerlabError(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another with --output."
        ) from None


def _close_failed(folder: Path, strategy: str) -> None:
    run = read_record(folder).get("mlflow_run")
    if run:
        tracking.end_open_runs(strategy, run)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one run at a time in a folder."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LayerlabError(
                f"Another run is at work in {folder}; wait for it, or choose another folder with --output."
            ) from None
        yield


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[Path]:
    """What the kernel inherits: where to write, where to track, where to report progress (the file is given)."""
    with tempfile.TemporaryDirectory() as temporary:
        events = Path(temporary) / "progress.jsonl"
        events.touch()
        wanted = {
            OUTPUT: str(folder),
            VARIABLE: str(events),
            "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
            "LAYERLAB_HOME": str(tracking.workbook_folder()),
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield events
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    logger = logging.getLogger("papermill")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _drawn(strategy: str, profile: str, events: Path, show: bool, bar: int) -> Iterator[None]:
    """Draw the kernel's progress from its event file while the block runs."""
    if not show:
        yield
        return
    plain = not sys.stderr.isatty()
    start = time.monotonic()
    tqdm.write(f"{strategy} ({profile}): running its notebook", file=sys.stderr)
    bars = Bars(position=bar, plain=plain)
    stop = threading.Event()

    def follow() -> None:
        with events.open(encoding="utf-8") as stream:
            rest = ""
            while True:
                ending = stop.is_set()
                rest += stream.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    bars.update(json.loads(line))
                if ending:
                    return
                stop.wait(0.3)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bars.close()
        tqdm.write(f"{strategy} ({profile}): {time.monotonic() - start:.0f} s", file=sys.stderr)
