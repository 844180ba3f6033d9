"""How runners start: forked from a warm server, or, where that cannot be, each as a new Python."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from layerlab.base.errors import LayerlabError
from layerlab.base.provenance import package_folders
from layerlab.runs.batch.warm_server import TOLD
from layerlab.runs.notebook_file import read_notebook
from layerlab.show.progress import VARIABLE

# Variables that nothing reads at its import, so that notebooks may differ in them and have one server.
_LATE = (VARIABLE, "CUDA_VISIBLE_DEVICES")
# How often a server that ends by itself is started again.
_STARTS = 3
# Memory of a server that has imported everything, in 10⁹ bytes: 0.63 were measured, and 0.4 of files, which the system
# can give up.
SERVER_GB = 0.8
# Seconds that a server has for a fork, behind the import of a module.
_PATIENCE = 60.0


class ForkedRunner:
    """A runner that a server has forked; with what is asked of a `subprocess.Popen`.

    Args:
        stdin: what it reads.
        status: the pipe on which it tells its process number and the server its exit status.

    Raises:
        EOFError: there is none.
        TimeoutError: nor has the server said so.
    """

    def __init__(self, stdin: IO[str], status: int) -> None:
        self.stdin = stdin
        self.returncode: int | None = None
        self._status = status
        if not select.select([status], [], [], _PATIENCE)[0]:
            raise TimeoutError
        self.pid = self._number("runs")

    def _number(self, word: str) -> int:
        """The number behind a word that comes through the pipe; waits for it."""
        text = b""
        while not text.endswith(b"\n"):
            part = os.read(self._status, 1)
            if not part:
                raise EOFError
            text += part
        told, _, number = text.decode().partition(" ")
        if told != word:
            raise EOFError
        return int(number)

    def poll(self) -> int | None:
        """Its exit status, or None while it lives; 1 where the server that knew it is gone, too."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("a runner", timeout or 0.0)
        return status

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            # The runner holds the pipe open as well: its end is that of both.
            try:
                self.returncode = self._number("ended")
            except EOFError:
                self.returncode = 1
            os.close(self._status)
        return self.returncode


Runner = subprocess.Popen[str] | ForkedRunner


class Runners:
    """Starts runners, and the servers that they are forked from: one for each environment of notebooks.

    A server is superseded when something is installed meanwhile.

    Use it as a context; the servers go at its end.

    Args:
        imports: names of modules that the notebooks import.

    Example:
        >>> with Runners(["layerlab"]) as runners:
        ...     pass
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = imports
        self._lock = threading.Lock()
        self._servers: dict[frozenset[tuple[str, object]], _Server] = {}

    def __enter__(self) -> Runners:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.close()

    def start(self, variables: Mapping[str, str], log: Path) -> tuple[Runner, int]:
        """A runner, and the file descriptor that its outcome comes from.

        Args:
            variables: of its environment, besides this process's; among them that of its events.
            log: for what it and its cells print.
        """
        environment = {**os.environ, **variables}
        early: dict[str, object] = {name: value for name, value in environment.items() if name not in _LATE}
        installed = {folder: os.stat(folder).st_mtime_ns for folder in package_folders()}
        with self._lock:
            server = self._servers.setdefault(frozenset((early | installed).items()),
                                              _Server(environment, self._imports))
        return server.start(environment, log) or started_anew(variables, log)


class _Server:
    """A warm server, started when it is first needed, and again where it has ended.

    Args:
        environment: of the first runner that is wanted.
        imports: names of modules that the notebooks import.
    """

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str]) -> None:
        self._imports = imports
        # A forked process writes its own over it, so there has to be room for just that.
        self._environment = {**environment, VARIABLE: "-" * len(environment[VARIABLE])}
        self._lock = threading.Lock()
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, environment: Mapping[str, str], log: Path) -> tuple[ForkedRunner, int] | None:
        """As `Runners.start`; None where a fork is not possible."""
        if not sys.platform.startswith("linux") or len(environment[VARIABLE]) != len(self._environment[VARIABLE]):
            return None
        for _ in range(_STARTS):
            asked = self._asked()
            if asked is None:
                return None
            try:
                return _forked(asked, environment, log)
            except TimeoutError:
                self._give_up()
            except (EOFError, OSError):
                continue
        return None

    def _give_up(self) -> None:
        """Start no server again in the place of one that hangs."""
        with self._lock:
            self._starts = _STARTS
            self.close()

    def _asked(self) -> socket.socket | None:
        """The socket of the server that runs, or of a new one; None where each of them ended by itself."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return self._socket
            self.close()
            if self._starts == _STARTS or (self._process is not None and self._process.returncode == TOLD):
                return None
            self._starts += 1
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "layerlab.runs.batch.warm_server", str(theirs.fileno()), *self._imports],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], env=self._environment, start_new_session=True,
                )
            return self._socket

    def close(self) -> None:
        """End it; the runners that it forked go on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def imported(notebooks: Iterable[Path]) -> list[str]:
    """Names of the top-level modules that notebooks import, as far as their code says it at the beginning of a line."""
    names: set[str] = set()
    for notebook in notebooks:
        # One that cannot be read fails by itself, and with a sentence.
        with contextlib.suppress(LayerlabError):
            for cell in read_notebook(notebook)["cells"]:
                for kind, text in re.findall(r"(?m)^\s*(import|from)\s+(.*)", cell["source"]):
                    modules = text.split(",") if kind == "import" else [text.partition(" ")[0]]
                    names |= {module.split()[0].partition(".")[0] for module in modules if module.strip()}
    return sorted(names)


def _forked(server: socket.socket, environment: Mapping[str, str], log: Path) -> tuple[ForkedRunner, int]:
    """A runner that the server at the other end of a socket forks.

    Raises:
        EOFError: it has forked none.
        OSError: it is gone.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        stdin, told = os.pipe()
        channel, answer = os.pipe()
        status, tells = os.pipe()
        for stream in (stdin, answer, tells):
            theirs.callback(os.close, stream)
        words = ours.enter_context(os.fdopen(told, "w"))
        for stream in (channel, status):
            ours.callback(os.close, stream)
        with log.open("wb") as printed:
            message = json.dumps(dict(environment)).encode()
            socket.send_fds(server, [message], [stdin, printed.fileno(), answer, tells])
        theirs.close()
        runner = ForkedRunner(words, status)
        ours.pop_all()
        return runner, channel


def started_anew(variables: Mapping[str, str], log: Path) -> tuple[subprocess.Popen[str], int]:
    """As `Runners.start`, in a new Python that imports everything itself."""
    channel, told = os.pipe()
    try:
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "layerlab.runs.batch.notebook_process", str(told)],
                stdin=subprocess.PIPE, stdout=printed, stderr=printed, text=True, pass_fds=[told],
                env={**os.environ, **variables},
                # A terminal's Ctrl-C is for the batch, which passes it on in its own way.
                start_new_session=True,
            )
    except BaseException:
        os.close(channel)
        raise
    finally:
        os.close(told)
    return process, channel
