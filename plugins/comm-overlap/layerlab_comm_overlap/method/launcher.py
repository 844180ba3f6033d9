"""Workers started from a notebook or a script, by torch.distributed's own launcher."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from layerlab import LayerlabError
from layerlab_comm_overlap.method.peers import TIME_LIMIT, PeerLost, watched

_CLONE_NEWNET = 0x40000000


def launch(
    function: Callable[..., Any], workers: int, *arguments: Any, restarts: int = 0, threads: int | None = None,
    networks: Sequence[str] = (), time_limit: float = TIME_LIMIT, **named: Any,
) -> list[Any]:
    """Run a function in several worker processes that form a process group, and collect what it returns.

    `launch(fit, 4, network, data, CommOverlap(), epochs=3)` trains on four workers. Functions and networks that were
    defined in the notebook travel too. No port is chosen by anyone but the system, so that jobs do not collide.

    Args:
        function: called in each worker as `function(*arguments, **named)`.
        workers: how many; on a machine with GPUs each has one of its own.
        restarts: after a worker's death, start all of them again so many times; a fit with a checkpoint goes on.
        threads: of each worker. Default: the machine's processors shared out.
        networks: a network namespace for each worker to live in; default: the machine's own.
        time_limit: seconds that workers wait for one that does not come to where they meet; then the job ends.

    Returns:
        What the function returned, a value a worker, by rank.

    Raises:
        LayerlabError: a worker died, with its rank and its error and the worker's own traceback as the cause; or a
            worker hangs, with its rank. All are ended.
    """
    if workers < 1:
        raise LayerlabError(f"workers must be at least 1, got {workers}.")
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    with tempfile.TemporaryDirectory(prefix="comm-overlap-") as folder:
        payload = Path(folder) / "call"
        payload.write_bytes(cloudpickle.dumps((function, arguments, named)))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=workers, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1, start_method="spawn",
            local_addr="localhost", logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with _own_signals(), _quiet():
                results = elastic_launch(config, _work)(folder, threads, tuple(networks), time_limit)
        except ChildFailedError as error:
            hung = Path(folder) / f"hung-{restarts}"
            if hung.exists():
                raise LayerlabError(hung.read_text()) from None
            rank, failure = _culprit(error)
            raise LayerlabError(_explain(rank, failure, workers)) from _told(rank, failure)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise
        return [cloudpickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in sorted(results)]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give this process its signal handlers back, which the launcher replaces: a notebook's interrupt is one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                                                            signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the launcher's logs, which would bury the one sentence on what happened."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _culprit(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The worker that failed, not those that failed because they missed it."""
    return min(error.failures.items(), key=lambda item: (
        PeerLost.__name__ in str(item[1].message), item[1].timestamp, item[0]))


def _explain(rank: int, failure: ProcessFailure, workers: int) -> str:
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", message)
    text = (str(message).strip().splitlines() or [""])[0]
    if failure.exitcode < 0:
        text = f"killed by {failure.signal_name()}"
    return f"Worker {rank} of {workers} died: {text} (exit code {failure.exitcode}); the others were ended."


class WorkerTraceback(Exception):
    """Where a worker failed, as it printed it there."""

    def __str__(self) -> str:
        return f"in worker {self.args[0]}\n{self.args[1]}"


def _told(rank: int, failure: ProcessFailure) -> WorkerTraceback | None:
    message = failure.message
    calls = message.get("extraInfo", {}).get("py_callstack") if isinstance(message, dict) else None
    return WorkerTraceback(rank, calls.strip()) if calls else None


def _work(folder: str, threads: int, networks: tuple[str, ...], time_limit: float) -> int:
    """In a worker: join the others, call the function, leave its result in a file."""
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if networks:
        enter_network(networks[rank])
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= workers
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A file, so that workers in different networks find each other too; a new one after a restart.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    (Path(folder) / f"process-{attempt}-{rank}").write_text(str(os.getpid()))
    meeting = Path(folder) / f"meeting-{attempt}"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=meeting.as_uri(), rank=rank, world_size=workers,
                            timeout=timedelta(seconds=time_limit))
    try:
        function, arguments, named = cloudpickle.loads((Path(folder) / "call").read_bytes())
        with watched(time_limit):
            result = function(*arguments, **named)
        (Path(folder) / f"result-{rank}").write_bytes(cloudpickle.dumps(result))
    except PeerLost as error:
        if error.hanging:
            _end(Path(folder), attempt, error)
        raise
    finally:
        dist.destroy_process_group()
    return rank


def _end(folder: Path, attempt: str, error: PeerLost) -> None:
    """Leave word, and kill the workers that hang: a stopped process does not heed the launcher, which waits for it."""
    word = folder / f"hung-{attempt}"
    with suppress(FileExistsError), word.open("x") as handle:
        handle.write(str(error))
    for rank in error.hanging:
        with suppress(ProcessLookupError):
            os.kill(int((folder / f"process-{attempt}-{rank}").read_text()), signal.SIGKILL)


def enter_network(name: str) -> None:
    """Move this process into a network namespace that `ip netns` made; its threads to come follow.

    Raises:
        LayerlabError: there is none of that name, or this process may not.
    """
    try:
        with open(f"/run/netns/{name}") as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        raise LayerlabError(f"Network namespace {name!r} cannot be entered ({error.strerror}).") from None
    # Of the interfaces in there one leads to the other workers.
    os.environ["GLOO_SOCKET_IFNAME"] = "link"
