"""Many notebooks: on this machine as many at once as it carries, or on a Dask cluster; nothing finished is run again.

Each notebook runs in its own process (`layerlab.runs.batch.notebook_process`), so a kernel or a runner that dies takes
nothing else along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from layerlab.base.errors import LayerlabError, reason, refusal
from layerlab.runs import tracking
from layerlab.runs.basis import State
from layerlab.runs.batch.cluster import on_cluster
from layerlab.runs.batch.kept import batch_id, keep_batch
from layerlab.runs.batch.machine import Machine
from layerlab.runs.batch.one_job import Outcome, Stop, run_job
from layerlab.runs.batch.runners import SERVER_GB, Runners, imported
from layerlab.runs.jobs import Job
from layerlab.runs.record import read_record, workbook_folder
from layerlab.show.progress import Board, clock


def preview(jobs: Sequence[Job], rerun: bool = False) -> list[tuple[Job, str, str]]:
    """What a batch would do: (job, `done before`, `goes on`, `runs` or `refused`, how long it took last time, why it
    is refused, or what has changed since it was finished) each."""
    rows = []
    for job in jobs:
        if job.problem:
            rows.append((job, "refused", job.problem))
            continue
        record = read_record(Path(job.folder))
        status, state = "runs", State(False) if rerun else job.state()
        if state.done:
            status = "done before"
        elif record and not record.get("finished") and record.get("basis") == job.basis and not rerun:
            status = "goes on"
        last = clock(record["seconds"]) if record.get("seconds") else "never run"
        rows.append((job, status, f"{last}; {state.why}" if state.why and not state.done else last))
    return rows


def run_batch(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    time_limit: float | None = None,
    retries: int = 2,
    rerun: bool = False,
    scheduler: str = "",
    board: Board | None = None,
) -> list[Outcome]:
    """Run jobs, each unless it is done.

    The first SIGINT or SIGTERM ends kernels and closes their runs, and what was interrupted goes on next time; a
    second one ends everything at once.

    Args:
        jobs: see `layerlab.runs.batch.plans.jobs_of`.
        workers: notebooks at once on this machine; default: as many as cores, memory and GPUs carry.
        time_limit: seconds a notebook may take.
        retries: how often a notebook whose kernel or runner died is taken up again.
        rerun: also what is done.
        scheduler: address of a Dask scheduler whose workers see the same folders; empty: this machine.
        board: where progress is drawn.

    Returns:
        One outcome a job, in their order.

    Raises:
        LayerlabError: the scheduler cannot be reached.
    """
    sound = [job for job in jobs if not job.problem]
    board = board or Board(total=len(sound))
    batch = batch_id(sound)
    try:
        keep_batch(batch, sound)
    except LayerlabError as error:  # a disk that is full ends no batch
        board.line(f"`layerlab table` will not know this batch: {error}")
    environment = {
        "LAYERLAB_BATCH": os.environ.get("LAYERLAB_BATCH", batch),
        "LAYERLAB_HOME": str(workbook_folder()),
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
    }
    limits = {"time_limit": time_limit, "retries": retries, "rerun": uuid.uuid4().hex if rerun else ""}
    try:
        with _stoppable(board) as stop:
            if scheduler:
                outcomes = iter(on_cluster(sound, scheduler, environment, limits, stop, board))
            else:
                outcomes = iter(_on_this_machine(sound, workers, environment, limits, stop, board))
    finally:
        board.close()
    return [Outcome("refused", job.problem) if job.problem else next(outcomes) for job in jobs]


@contextlib.contextmanager
def _stoppable(board: Board) -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP set the flags while the block runs; one that is ignored (`nohup`) stays ignored."""
    stop = Stop()

    def handle(number: int, _: Any) -> None:
        if stop.asked.is_set():
            stop.now.set()
            return
        stop.asked.set()
        board.line("Stopping: what was interrupted goes on next time; once more ends everything at once.")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_this_machine(
    jobs: Sequence[Job], workers: int | None, environment: Mapping[str, str], limits: Mapping[str, Any], stop: Stop,
    board: Board,
) -> list[Outcome]:
    machine = Machine(workers or 1)
    at_once = min(workers or machine.all_cores, len(jobs))
    share = max(1, machine.all_cores // max(1, at_once))
    # Those that need the machine to themselves last, the longest of the others first.
    waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].cores == "all", -(jobs[i].last_seconds or 1e9)))
    # Asked here as well as in run_job, so that what is done does not wait for room.
    states = {number: jobs[number].state(limits["rerun"]) for number in waiting}
    outcomes = {number: Outcome("done before", state.why) for number, state in states.items() if state.done}
    for number, state in states.items():
        if state.why and not state.done:
            board.line(f"{jobs[number].label} runs again: {state.why}.")
    waiting = [number for number in waiting if number not in outcomes]
    for number in outcomes:
        jobs[number].rename_partial()
        board.step()
    running: dict[Future[Outcome], tuple[int, Callable[[], None]]] = {}
    # The first is forked before anything is imported, and what is imported behind it is for the others.
    imports = imported({Path(jobs[number].notebook) for number in waiting}) if len(waiting) > 1 else []
    # What a notebook is forked from takes memory besides it.
    machine.memory -= SERVER_GB if imports else 0.0
    with Runners(imports) as runners, ThreadPoolExecutor(max(1, len(jobs))) as pool:
        while waiting or running:
            for number in list(waiting):
                if stop.asked.is_set():
                    waiting.remove(number)
                    outcomes[number] = Outcome("stopped")
                    board.step()
                    continue
                job = jobs[number]
                room = machine.take(job, share) if len(running) < at_once else None
                if room is None:
                    continue
                waiting.remove(number)
                board.start(job.label, job.last_seconds)
                future = pool.submit(
                    run_job, job, {**environment, **room[0]},
                    partial(board.event, job.label), stop, start=runners.start, **limits,
                )
                running[future] = (number, room[1])
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            board.tick()
            for future in finished:
                number, give_back = running.pop(future)
                give_back()
                outcomes[number] = _outcome(future, jobs[number])
                board.end(jobs[number].label, outcomes[number].status)
    return [outcomes[number] for number in range(len(jobs))]


def _outcome(future: Future[Outcome], job: Job) -> Outcome:
    """How a job ended; also if what runs it could not be started, which ends this job and no other."""
    try:
        return future.result()
    except Exception as error:  # no process, no temporary folder, no file descriptor left
        return Outcome("failed", f"The notebook of {job.name!r} could not be run ({refusal(error) or reason(error)}).")
