"""A kernel that is forked from a process which has imported what notebooks need, for the one that a runner starts.

Cells find it as they find one that was started anew, with its own random numbers, environment, folder, path, signals,
files and threads. What differs: modules that other notebooks of the batch import are loaded (`sys.modules`), with what
they set up at their import, such as filters for warnings of their own classes, which stand behind those that a cell
sets before it imports them; the kernels of one server share the seed of `hash`, unless `$PYTHONHASHSEED` says one; and
a library's settings file is read when the server starts.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import all_suffixes
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, cast

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from layerlab.base.process_label import relabel
from layerlab.show.progress import VARIABLE

MODULE = "ipykernel_launcher"
NAME = "layerlab-warm"
# What Python is told in the command of ipykernel's own kernel, for the sake of its debugger alone.
_OPTIONS = {"-Xfrozen_modules=off"}
# Seconds that the last answer of a kernel takes at most.
_CONTROL = 1.0
# At their import they find out whether they are in a notebook, and which process they end with.
_ANEW = ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook", "ipykernel.kernelapp")
# What a kernel draws with, unless its environment says otherwise.
_INLINE = "module://matplotlib_inline.backend_inline"
# A file by which matplotlib is set up for the folder that it is imported in.
_SETTINGS = "matplotlibrc"


class ForkedKernel:
    """A process that waits to be a kernel; with what jupyter_client asks of a `subprocess.Popen`.

    Args:
        pid: its number.
        told: the pipe that it waits at.
    """

    stdin = stdout = stderr = None

    def __init__(self, pid: int, told: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str], folder: str | None) -> None:
        """Have it be a kernel from now on.

        Args:
            arguments: of `python -m ipykernel_launcher`.
            environment: its variables, all of them.
            folder: its working directory; None: this process's.
        """
        asked = {"arguments": list(arguments), "environment": dict(environment), "folder": folder}
        # One that was killed while it waited is found dead by whoever asks next.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._told, "w") as stream:
            stream.write(json.dumps(asked) + "\n")

    def poll(self) -> int | None:
        """Its exit status, or None while it lives."""
        if self.returncode is None:
            try:
                child, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                # Another part of this process has waited for it.
                child, status = self.pid, signal.SIGKILL
            if child:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(MODULE, timeout or 0.0)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def fork_kernel(private: Sequence[int]) -> ForkedKernel | None:
    """Fork a process that waits to be a kernel, while this one has no thread and has opened nothing.

    Args:
        private: file descriptors of this process alone.

    Returns:
        None in the forked process, when it was a kernel and has ended.
    """
    order, told = os.pipe()
    child = os.fork()
    if child:
        os.close(order)
        return ForkedKernel(child, told)
    for stream in (told, *private):
        os.close(stream)
    os.setsid()
    relabel(["python", "-m", MODULE], VARIABLE, os.environ[VARIABLE])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    with os.fdopen(order) as orders:
        text = orders.readline()
    if text:
        _be_kernel(**json.loads(text))
    return None


def _be_kernel(arguments: list[str], environment: dict[str, str], folder: str | None) -> None:
    """Be what `python -m ipykernel_launcher` is, but for what is imported already."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ.clear()
    os.environ.update(environment)
    if folder:
        os.chdir(folder)
    sys.path[:] = _path(before, environment.get("PYTHONPATH", ""))
    for name in list(sys.modules):
        # layerlab may be a checkout that was edited since, and a notebook that does not use it does not rest on it.
        if name in _ANEW or name.partition(".")[0] == "layerlab":
            del sys.modules[name]
    for name in _ANEW:
        package, _, last = name.rpartition(".")
        if package in sys.modules:
            # Otherwise `from package import module` gives the old one.
            vars(sys.modules[package]).pop(last, None)
    _renew_libraries()
    for frame, _ in traceback.walk_stack(sys._getframe()):
        # A library that looks at the whole stack reads these files, and would have the notebook rest on them.
        linecache.getlines(frame.f_code.co_filename)
    sys.argv = [MODULE, *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    _wait_for_control()


def _renew_libraries() -> None:
    """Have what is imported already draw, compute and choose as if it were imported now."""
    if "matplotlib" in sys.modules:
        import matplotlib

        matplotlib.rcParams["backend"] = os.environ.get("MPLBACKEND") or _INLINE
    if "numpy" in sys.modules:
        import numpy as np

        # Python's own generator does so by itself.
        np.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
    usable = str(len(os.sched_getaffinity(0)))
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or usable
    if threads != "1" and threads.isdigit():
        from threadpoolctl import threadpool_limits

        # The server had one alone, so that it would fork none.
        threadpool_limits(int(threads), user_api="blas")


def _wait_for_control() -> None:
    """Wait until the thread that takes the order to shut down is done with it.

    It empties the streams at last, through a thread that ipykernel stops at the exit; where that is stopped first, it
    waits for ten seconds. A kernel that takes apart what it has imported gets there late enough.
    """
    from ipykernel.kernelapp import IPKernelApp

    thread = IPKernelApp.instance().control_thread
    if thread is not None and thread.is_alive():
        done = threading.Event()
        thread.io_loop.add_callback(done.set)
        done.wait(_CONTROL)


def _path(before: str, now: str) -> list[str]:
    """`sys.path` as Python makes it for a module that it runs, with another `$PYTHONPATH` than this process had."""
    old, new = [[os.path.abspath(part) for part in text.split(os.pathsep) if part] for text in (before, now)]
    first = [] if sys.flags.safe_path else [""]
    return list(dict.fromkeys([*first, *new, *(part for part in sys.path[len(first) :] if part not in old)]))


class Provisioner(LocalProvisioner):
    """Starts the kernel that waits, if it is of this Python and the first; any other as jupyter_client does."""

    waiting: ClassVar[list[ForkedKernel]] = []

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Launch a kernel with a command."""
        arguments = _arguments(cmd)
        # The kernel ends when this process, its parent, is no more.
        environment = {**kwargs.get("env", os.environ), "JPY_PARENT_PID": str(os.getpid())}
        folder = kwargs.get("cwd")
        # What a kernel's specification adds to the environment may be for libraries that are imported already.
        alike = arguments is not None and not self.kernel_spec.env and not _imports_others(environment, folder)
        if not self.waiting or not alike:
            return await super().launch_kernel(cmd, **kwargs)
        kernel = self.waiting.pop()
        kernel.begin(arguments or [], environment, folder)
        # All that is asked of it is what a `Popen` has.
        self.process = cast("subprocess.Popen[Any]", kernel)
        self.pid = self.pgid = kernel.pid
        return self.connection_info


def _arguments(command: Sequence[str]) -> list[str] | None:
    """What a command tells `ipykernel_launcher`, if that is run by this Python; otherwise None."""
    # That of another virtual environment may be a link to the same file.
    theirs, ours = [(os.path.realpath(os.path.dirname(each)), os.path.realpath(each))
                    for each in (command[0], sys.executable)]
    if MODULE not in command or theirs != ours:
        return None
    place = command.index(MODULE)
    *options, last = command[1:place] or [""]
    return list(command[place + 1 :]) if last == "-m" and set(options) <= _OPTIONS else None


def _imports_others(environment: Mapping[str, str], folder: str | None) -> bool:
    """Whether a kernel with that environment and folder would import others in the place of modules that are here.

    So it is where a folder that it looks into first, and this process did not, holds modules of the same names, or
    where one of the two processes reads settings for its working directory alone.
    """
    here, there = os.getcwd(), os.path.abspath(folder or "")
    known, path = [variables.get("PYTHONPATH", "").split(os.pathsep) for variables in (os.environ, environment)]
    folders = {here, there, *(part for part in path if part and part not in known)}
    names = {name.partition(".")[0] for name in sys.modules} - {"layerlab", "__main__"}
    for each in folders:
        with contextlib.suppress(OSError), os.scandir(each) as entries:
            for entry in entries:
                name, dot, ending = entry.name.partition(".")
                module = dot + ending in all_suffixes() or os.path.exists(os.path.join(entry.path, "__init__.py"))
                if (name in names and module) or (entry.name == _SETTINGS and here != there):
                    return True
    return False


def provide(kernel: ForkedKernel) -> None:
    """Have the first kernel that jupyter_client starts here be this one."""
    Provisioner.waiting.append(kernel)
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[NAME] = EntryPoint(NAME, f"{__name__}:{Provisioner.__name__}", factory.GROUP_NAME)
    factory.default_provisioner_name = NAME
