"""Many notebooks: on this machine as many at once as it carries, or on a Dask cluster; nothing finished is run again.

Each notebook is run by a process of its own (`layerlab.runner`), so that neither a kernel nor a runner that dies takes
anything else along.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from layerlab import tracking
from layerlab.errors import LayerlabError
from layerlab.notebooks import Job, fail
from layerlab.progress import VARIABLE, Board, clock, followed
from layerlab.runner import STOP, TIME, kernel_of
from layerlab.study import read_record

Tell = Callable[[dict[str, Any]], None]
Status = Literal["finished", "done before", "failed", "refused", "stopped"]
GRACE = 15.0  # seconds that a runner has for ending its kernel and closing its runs


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: `finished`; `done before`, when there was nothing to do; `failed`; `refused` for bad input that only
            the notebook could see, a folder that cannot be written, or a job that came with a problem; `stopped` by a
            person.
        message: one sentence, for a failure.
    """

    status: Status
    message: str = ""


def preview(jobs: Sequence[Job], since: float = 0.0) -> list[tuple[Job, str, str]]:
    """What a batch would do: (job, `done before`, `goes on`, `runs` or `refused`, how long it took last time or why
    it is refused) each."""
    rows = []
    for job in jobs:
        if job.problem:
            rows.append((job, "refused", job.problem))
            continue
        record = read_record(Path(job.folder))
        status = "runs"
        if job.is_done(since):
            status = "done before"
        elif record and not record.get("finished") and record.get("key") == job.key and not since:
            status = "goes on"
        rows.append((job, status, clock(job.last_seconds) if job.last_seconds else "never run"))
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
        jobs: see `layerlab.plans.jobs_of`.
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
    environment = {
        "LAYERLAB_BATCH": os.environ.get("LAYERLAB_BATCH", uuid.uuid4().hex),
        "LAYERLAB_HOME": str(tracking.workbook_folder()),
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
    }
    limits = {"time_limit": time_limit, "retries": retries, "since": time.time() if rerun else 0.0}
    try:
        with _stoppable(board) as stop:
            if scheduler:
                outcomes = iter(_on_cluster(sound, scheduler, environment, limits, stop, board))
            else:
                outcomes = iter(_on_this_machine(sound, workers, environment, limits, stop, board))
    finally:
        board.close()
    return [Outcome("refused", job.problem) if job.problem else next(outcomes) for job in jobs]


class Stop:
    """Whether to stop: `asked` ends cleanly, `now` kills."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.now = threading.Event()


@contextlib.contextmanager
def _stoppable(board: Board) -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP set the flags while the block runs."""
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
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- one job


def run_job(
    job: Job,
    environment: Mapping[str, str],
    tell: Tell,
    stop: Stop,
    *,
    time_limit: float | None = None,
    retries: int = 2,
    since: float = 0.0,
) -> Outcome:
    """Run one job in a process of its own, and again if that or its kernel dies.

    Args:
        environment: variables for the notebook's kernel.
        tell: takes the notebook's progress.
        stop: looked at a few times a second.
        time_limit: seconds.
        retries: for a dead kernel or runner; an error in a cell is not tried again.
        since: what was finished before that time does not count as done, in seconds since 1970.
    """
    for _ in range(retries + 1):
        if stop.asked.is_set():
            return Outcome("stopped")
        # Looked up each time: a runner may have died after its notebook's last word, and dask gives a dead worker's
        # jobs to another one although they were finished.
        if job.is_done(since):
            job.settle()
            return Outcome("done before")
        status, message = _once(job, environment, tell, stop, time_limit, since)
        if status == "finished":
            return Outcome("finished")
        if status != "dead":
            return Outcome(status, message)
        if stop.asked.is_set():
            return Outcome("stopped")
        tell({"again": message})
    try:
        return Outcome("failed", str(fail(job, f"died {retries + 1} times; the last time: {message.rstrip('.')}")))
    except LayerlabError as error:
        return Outcome("failed", str(error))


def _once(
    job: Job, environment: Mapping[str, str], tell: Tell, stop: Stop, time_limit: float | None, since: float
) -> tuple[Status | Literal["dead"], str]:
    with tempfile.TemporaryDirectory(prefix="layerlab-") as temporary:
        events, log = Path(temporary) / "progress.jsonl", Path(temporary) / "log"
        events.touch()
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "layerlab.runner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, env={**os.environ, **environment, VARIABLE: str(events)},
                # A terminal's Ctrl-C is for the batch, which passes it on in its own way.
                start_new_session=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        told = _tell_process(process, json.dumps({"job": asdict(job), "since": since}, default=str))
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
        process.wait()
        answer = process.stdout.read().strip().rpartition("\n")[2]
        process.stdin.close()
        process.stdout.close()
        if answer:
            outcome = json.loads(answer)
            return outcome["status"], outcome["message"]
        _kill(process, events)
        if stop.asked.is_set():
            return "stopped", ""
        if end < float("inf"):
            return "failed", str(fail(job, "ran out of its time and had to be killed"))
        return "dead", _last_words(process.returncode, log)


def _tell_process(process: subprocess.Popen[str], line: str) -> bool:
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _kill(process: subprocess.Popen[str], events: Path) -> None:
    """End a runner and its kernel, which is in a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if kernel := kernel_of(events):
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel, signal.SIGKILL)


def _last_words(status: int, log: Path) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"its process {how}" + (f" ({lines[-1][:200]})" if lines else "")


# ------------------------------------------------------------------------------------------- one machine


class Machine:
    """What this machine has left for more notebooks.

    Args:
        at_once: notebooks that a person wants at once, even if they have to share threads.

    Attributes:
        threads: of the machine.
        cores: free threads, or places for notebooks where more are wanted at once than there are threads.
        memory: free host memory in 10⁹ bytes.
        gpus: free GPUs, as CUDA_VISIBLE_DEVICES names them.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.threads = len(os.sched_getaffinity(0))
        self.cores = self.all_cores = max(self.threads, at_once)
        self.memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        self.gpus = _gpus()
        self.has_gpus = bool(self.gpus)
        self.running = 0

    def take(self, job: Job, share: int) -> tuple[dict[str, str], Callable[[], None]] | None:
        """Room for a job: variables for its kernel and what gives the room back; None while there is none.

        A job that wants more than there is runs when nothing else does.
        """
        cores = self.all_cores if job.cores == "all" else min(max(job.cores, share), self.all_cores)
        short = cores > self.cores or job.memory_gb > self.memory or (self.has_gpus and not self.gpus)
        if self.running and short:
            return None
        gpu = self.gpus.pop(0) if self.gpus else None
        self.cores -= cores
        self.memory -= job.memory_gb
        self.running += 1

        def give_back() -> None:
            self.cores += cores
            self.memory += job.memory_gb
            self.running -= 1
            if gpu is not None:
                self.gpus.append(gpu)

        threads = min(cores, self.threads, int(os.environ.get("OMP_NUM_THREADS") or cores))
        environment = {"OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return environment, give_back


def _gpus() -> list[str]:
    """The GPUs that this process may use, without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


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
    outcomes = {number: Outcome("done before") for number in waiting if jobs[number].is_done(limits["since"])}
    waiting = [number for number in waiting if number not in outcomes]
    for number in outcomes:
        jobs[number].settle()
        board.step()
    running: dict[Future[Outcome], tuple[int, Callable[[], None]]] = {}
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
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
                    partial(board.event, job.label), stop, **limits,
                )
                running[future] = (number, room[1])
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                number, give_back = running.pop(future)
                give_back()
                outcomes[number] = future.result()
                board.end(jobs[number].label, outcomes[number].status)
    return [outcomes[number] for number in range(len(jobs))]


# ------------------------------------------------------------------------------------------- a cluster


def _on_cluster(
    jobs: Sequence[Job], address: str, environment: Mapping[str, str], limits: Mapping[str, Any], stop: Stop,
    board: Board,
) -> list[Outcome]:
    """Run jobs as tasks of a Dask cluster; a worker that has the resource `GPU` runs one job a GPU."""
    try:
        from distributed import Client, Event, as_completed
    except ImportError:
        raise LayerlabError(
            "A cluster needs dask.distributed; install it with pip install 'layerlab[cluster]'."
        ) from None

    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise LayerlabError(f"There is no Dask scheduler at {address} ({error}); start one with `dask scheduler`, or "
                            "leave out --scheduler to run here.") from None
    name = f"layerlab-{environment['LAYERLAB_BATCH']}"
    labels = {job.label for job in jobs}

    def tell(entry: Any) -> None:
        label, event = entry[1]["label"], entry[1]["event"]
        if label in labels:
            if event == "start":
                board.start(label)
            else:
                board.event(label, event)

    with client:
        halt = Event(f"{name}-stop", client=client)
        client.subscribe_topic(name, tell)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        resources = {"GPU": 1} if any(worker.get("resources", {}).get("GPU") for worker in workers) else None
        if not workers:
            board.line(f"The scheduler at {address} has no workers yet; the jobs wait for some.")
        # dask knows a task by its key; one of this batch's own, so that it does not hand out an old result.
        futures = {
            client.submit(_on_worker, job, dict(environment), dict(limits), name, key=f"{name}-{number}",
                          resources=resources, pure=False): number
            for number, job in enumerate(jobs)
        }
        outcomes: dict[int, Outcome] = {}

        def collect() -> None:
            for future in as_completed(futures):
                number = futures[future]
                try:
                    outcomes[number] = future.result()
                except Exception as error:  # whatever dask makes of a worker that died again and again
                    outcomes[number] = Outcome("failed", f"The notebook of {jobs[number].name!r} was lost: {error}.")
                board.end(jobs[number].label, outcomes[number].status)

        # In a thread, since the main one would not see signals while it waits for dask.
        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        told = False
        while collector.is_alive() and not stop.now.is_set():
            collector.join(0.2)
            if stop.asked.is_set() and not told:
                halt.set()
                told = True
        client.unsubscribe_topic(name)
        return [outcomes.get(number, Outcome("stopped")) for number in range(len(jobs))]


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
