"""The same jobs on a Dask cluster."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from layerlab.base.errors import LayerlabError
from layerlab.runs.batch.one_job import Outcome, Stop, run_job
from layerlab.runs.jobs import Job
from layerlab.show.progress import Board

# Seconds that a scheduler which is gone has for coming back.
RETURN = 120.0


def on_cluster(
    jobs: Sequence[Job], address: str, environment: Mapping[str, str], limits: Mapping[str, Any], stop: Stop,
    board: Board,
) -> list[Outcome]:
    """Run jobs as tasks of a Dask cluster; a worker that has the resource `GPU` runs one job a GPU.

    A scheduler that dies is waited for, and the one that comes in its place gets what is not finished.

    Raises:
        LayerlabError: dask.distributed is not installed, or there is no scheduler at the address.
    """
    outcomes: dict[int, Outcome] = {}
    # A batch that is run again has the same id; its tasks are others.
    run = uuid.uuid4().hex
    client = _connected(address)
    for attempt in itertools.count():
        waiting = {number: job for number, job in enumerate(jobs) if number not in outcomes}
        with client:
            _one_scheduler(client, f"{run}-{attempt}", waiting, environment, limits, stop, board, outcomes)
        lost = [number for number in waiting if number not in outcomes]
        if not lost or stop.asked.is_set():
            break
        board.line(f"The scheduler at {address} is gone; waiting {RETURN:g} s for one to come back. What its notebooks "
                   "finish meanwhile is not run again.")
        client = _come_back(address, stop)
        if client is None:
            why = f"The scheduler at {address} is gone; start it and its workers, and run the same command again."
            outcomes |= {number: Outcome("failed", f"The notebook of {jobs[number].name!r} was lost. {why}")
                         for number in lost}
            break
    return [outcomes.get(number, Outcome("stopped")) for number in range(len(jobs))]


def _come_back(address: str, stop: Stop) -> Any:
    """A client of the scheduler that comes in a dead one's place; None where none does in time, or a person stops."""
    deadline = time.monotonic() + RETURN
    while time.monotonic() < deadline and not stop.asked.is_set():
        with contextlib.suppress(LayerlabError):
            return _connected(address, timeout=2)
        time.sleep(0.5)
    return None


def _one_scheduler(
    client: Any, batch: str, jobs: Mapping[int, Job], environment: Mapping[str, str], limits: Mapping[str, Any],
    stop: Stop, board: Board, outcomes: dict[int, Outcome],
) -> None:
    """Run jobs, by number, as long as a scheduler lives; what ends is put into the outcomes."""
    from distributed import Event

    name = f"layerlab-{batch}"
    halt = Event(f"{name}-stop", client=client)
    client.subscribe_topic(name, partial(_tell, {job.label for job in jobs.values()}, board))
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    resources = {"GPU": 1} if any(worker.get("resources", {}).get("GPU") for worker in workers) else None
    if not workers:
        board.line("The scheduler has no workers yet; the jobs wait for some.")
    # dask knows a task by its key; this batch's name in it keeps dask from handing out an old result.
    futures = {
        client.submit(_on_worker, job, dict(environment), dict(limits), name, key=f"{name}-{number}",
                      resources=resources, pure=False): number
        for number, job in jobs.items()
    }
    # In a thread, since the main one would not see signals while it waits for dask.
    collector = threading.Thread(target=_collect, args=(futures, jobs, outcomes, board), daemon=True)
    collector.start()
    while collector.is_alive() and not stop.now.is_set():
        collector.join(0.2)
        if stop.asked.is_set() and not halt.is_set():
            halt.set()
    if client.status == "running":
        client.unsubscribe_topic(name)


def _connected(address: str, timeout: float = 10) -> Any:
    """A client of the scheduler at an address."""
    try:
        from distributed import Client
    except ImportError:
        raise LayerlabError(
            "A cluster needs dask.distributed; install it with pip install 'layerlab[cluster]'."
        ) from None
    try:
        return Client(address, timeout=timeout)
    except (OSError, TimeoutError, ValueError) as error:
        raise LayerlabError(f"There is no Dask scheduler at {address} ({error}); start one with `dask scheduler`, or "
                            "leave out --scheduler to run here.") from None


def _tell(labels: Collection[str], board: Board, entry: Any) -> None:
    """Show an event that a worker sent, if it is of one of these jobs."""
    label, event = entry[1]["label"], entry[1]["event"]
    if label not in labels:
        return
    if event == "start":
        board.start(label)
    else:
        board.event(label, event)


def _collect(
    futures: Mapping[Any, int], jobs: Mapping[int, Job], outcomes: dict[int, Outcome], board: Board
) -> None:
    """Put each job's outcome under its number, as it ends; a job whose scheduler is gone has none."""
    from distributed import as_completed

    for future in as_completed(futures):
        number = futures[future]
        try:
            outcomes[number] = future.result()
        except CancelledError:
            continue
        except Exception as error:  # what dask raises for a worker that died again and again
            outcomes[number] = Outcome("failed", f"The notebook of {jobs[number].name!r} was lost: {error}.")
        board.end(jobs[number].label, outcomes[number].status)


def _on_worker(job: Job, environment: dict[str, str], limits: dict[str, Any], name: str) -> Outcome:
    """The task: `run_job` on a Dask worker, with the share of its machine's threads that the worker gives a task."""
    from distributed import Event, get_worker

    worker = get_worker()
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // worker.state.nthreads))
    stop, halt, over = Stop(), Event(f"{name}-stop"), threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(Exception):  # the scheduler may be gone; the notebook goes on
                if halt.is_set():
                    stop.asked.set()

    threading.Thread(target=look, daemon=True).start()
    worker.log_event(name, {"label": job.label, "event": "start"})
    try:
        return run_job(job, environment, lambda event: worker.log_event(name, {"label": job.label, "event": event}),
                       stop, **limits)
    finally:
        over.set()
