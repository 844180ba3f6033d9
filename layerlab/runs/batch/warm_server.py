"""A process that has imported what notebooks need and forks their runners: `python -m layerlab.runs.batch.warm_server`.

Importing takes seconds, a fork milliseconds. The server runs nothing of any notebook, has a single thread and opens
nothing, so each runner starts from the same clean state; a runner forks its kernel before it does anything itself. A
request is one message on the socket that the first argument numbers, with the file descriptors of `STREAMS`; further
arguments name modules that the notebooks import. The server goes when the other end of the socket does; the runners
that it forked go on. It also goes, with the status `TOLD`, when such a module tells a warning at its import, which is
for the notebook to show.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from layerlab.base.process_label import relabel
from layerlab.runs.leaving import leave
from layerlab.show.progress import VARIABLE

# File descriptors of a request: what the runner reads, what it and its cells print to, where its outcome goes, and
# where it tells its process number and the server, at its end, its exit status.
STREAMS = ("stdin", "log", "channel", "status")
TOLD = 3
MODULE = "layerlab.runs.batch.notebook_process"
# What a runner and its kernel need.
BASE = ("layerlab.runs.papermill_engine", MODULE, "layerlab.runs.warm_kernel", "ipykernel.kernelapp",
        "ipykernel.debugger", "IPython.core.completerlib")
# What comes with a module that a notebook imports: the rest of it, and what the core imports of others, which stays
# when a kernel lets the core go.
ALONG = {
    "layerlab": ("layerlab.training.fit", "layerlab.runs.session", "mlflow", "mlflow.store.tracking.sqlalchemy_store",
                 "layerlab.show.figures", "torch.utils.flop_counter"),
    "matplotlib": ("matplotlib.pyplot",),
    "mlflow": ("mlflow.store.tracking.sqlalchemy_store",),
    "numpy": (), "pandas": (), "scipy": (), "seaborn": (), "sklearn": (), "torch": (), "torchvision": (),
}
# Libraries that start threads when they are imported, and how they are kept from it. A fork has one thread, whichever
# locks the others held.
SINGLE = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

_GIVEN = frozenset(os.environ)
Work = Callable[[], None]


def main() -> None:
    """Serve; or, in a process that was forked, be a runner or its kernel."""
    os.environ.update(SINGLE)
    work = _serve(socket.socket(fileno=int(sys.argv[1])))
    if work is not None:
        shared = frozenset(sys.modules)
        work()
        leave(shared)


def _serve(requests: socket.socket) -> Work | None:
    """Fork a runner at each request, and import meanwhile.

    Returns:
        In a forked process, what it is to do; None in the server, at its end.
    """
    # Where processes cannot be labelled or watched this ends here, and whoever waits sees the socket close.
    # The text there keeps room for a path and is none.
    relabel(sys.orig_argv, VARIABLE, os.environ.pop(VARIABLE))
    os.close(os.pidfd_open(os.getpid()))
    steps = _steps(sys.argv[2:])
    waiting = True
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0 if waiting else None):
                if key.fileobj is not requests:
                    selector.unregister(key.fileobj)
                    _tell_end(key.fd, *key.data)
                    continue
                message, streams, _, _ = socket.recv_fds(requests, 1 << 20, len(STREAMS))
                if not message:
                    return None
                if len(streams) < len(STREAMS):
                    # This process has no file descriptor left; whoever asked sees the others close.
                    for stream in streams:
                        os.close(stream)
                    continue
                work = _forked(message, streams, selector)
                if work is not None:
                    return work
            waiting = next(steps, False)


def _steps(names: Sequence[str]) -> Iterator[bool]:
    """Import what notebooks need that import these modules, one module a step."""
    from layerlab.runs.jobs import import_papermill

    import_papermill()
    import nbformat

    # It makes the code of its validator when it is first asked.
    nbformat.validate(nbformat.v4.new_notebook())
    yield True
    more = [module for name in names if name in ALONG for module in (name, *ALONG[name])]
    for name in BASE:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
        yield True
    for name in dict.fromkeys(more):
        _import_quietly(name)
        yield True
    gc.collect()
    # What is here stays; a collection in a fork would copy it.
    gc.freeze()


def _import_quietly(name: str) -> None:
    """Import a module for the notebooks; this process ends where it tells a warning."""
    told: list[Any] = []

    def tell(*arguments: Any, **more: Any) -> None:
        told.append((arguments, more))

    shown, warnings.showwarning = warnings.showwarning, tell
    # Without it a notebook imports it itself, and tells what is wrong.
    with contextlib.suppress(Exception):
        importlib.import_module(name)
    if warnings.showwarning is tell:
        warnings.showwarning = shown
    if told:
        raise SystemExit(TOLD)


def _holds_device() -> bool:
    """Whether a library has opened a GPU, which a fork cannot use."""
    for stream in os.listdir("/proc/self/fd"):
        # That of the list itself is closed by now.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{stream}").startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
                return True
    return False


def _forked(message: bytes, streams: list[int], selector: selectors.BaseSelector) -> Work | None:
    """Fork a runner; None here, and there what it is to do. Where it cannot be, its streams close without a word."""
    *others, status = streams
    child = -1
    if len(os.listdir("/proc/self/task")) == 1 and not _holds_device():
        with contextlib.suppress(OSError):
            child = os.fork()
    if child == 0:
        for key in selector.get_map().values():
            os.close(key.fd)
            if key.data:
                os.close(key.data[1])
        return functools.partial(_be_runner, json.loads(message), dict(zip(STREAMS, streams, strict=True)))
    for stream in others:
        os.close(stream)
    if child == -1:
        os.close(status)
        return None
    selector.register(os.pidfd_open(child), selectors.EVENT_READ, (child, status))
    return None


def _tell_end(ended: int, child: int, status: int) -> None:
    """Tell whoever asked for a runner how it ended."""
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ended)
    with contextlib.suppress(OSError):
        os.write(status, f"ended {number}\n".encode())
    os.close(status)


def _be_runner(environment: dict[str, str], streams: dict[str, int]) -> None:
    """In the forked process: be what `python -m layerlab.runs.batch.notebook_process` is, and its kernel."""
    from layerlab.runs import warm_kernel
    from layerlab.runs.batch import notebook_process

    os.setsid()
    for stream, standard in (("stdin", 0), ("log", 1), ("log", 2)):
        os.dup2(streams[stream], standard)
    for stream in ("stdin", "log"):
        os.close(streams[stream])
    # Variables that libraries set when they are imported belong to what is imported here.
    theirs = {name: value for name, value in os.environ.items() if name not in _GIVEN and name not in SINGLE}
    os.environ.clear()
    os.environ.update(theirs | environment)
    relabel(["python", "-m", MODULE], VARIABLE, environment[VARIABLE])
    # Only now, when whoever asked for it could end it and all that it starts.
    os.write(streams["status"], f"runs {os.getpid()}\n".encode())
    kernel = warm_kernel.fork_kernel([streams["channel"], streams["status"]])
    if kernel is None:
        return
    warm_kernel.provide(kernel)
    sys.argv = [MODULE, str(streams["channel"])]
    notebook_process.main()


if __name__ == "__main__":
    main()
