"""What several tests use: a small residual network, a strategy that freezes and thaws, equality of weights; servers and
a browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from layerlab import Run, Strategy, forward_order

# For tests that take more than their share of CI's ten minutes.
slow = pytest.mark.skipif(not os.environ.get("LAYERLAB_SLOW"), reason="slow: make test-all")
# Checks of the contract that take many seconds, and with which strategies; none named: with any.
SLOW_CHECKS = {"composes": (), "compiles": (), "pickles": (), "costs_logged": ("low-bit",),
               "resumes": ("low-bit", "memory-reorder")}


def run_check(strategy: Strategy, check: Any) -> None:
    """One check of the contract, unless it is a slow one and those are not asked for."""
    slow_with = SLOW_CHECKS.get(check.__name__)
    takes_long = slow_with is not None and (not slow_with or strategy.name in slow_with)
    if takes_long and not os.environ.get("LAYERLAB_SLOW"):
        pytest.skip("slow: make test-all")
    check(strategy)


class Freezer(Strategy):
    """Freezes 0, 2, 4, 2, 0, … modules, but never the last one, by its own count of epochs."""

    name: ClassVar[str] = "freezer"
    seconds: float = 0.0
    """To wait in each step."""

    _count: int = PrivateAttr(0)
    _order: list[Any] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        self._count = 0
        self._order = [module for _, module in forward_order(run.model, run.example)]

    def on_epoch_start(self, run: Run) -> None:
        frozen = min((0, 2, 4, 2)[self._count % 4], len(self._order) - 1)
        run.freeze(self.name, self._order[:frozen])
        run.log("freezer/frozen", frozen)

    def on_after_backward(self, run: Run) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def on_epoch_end(self, run: Run) -> None:
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]


class Residual(nn.Module):
    """conv–bn, a residual block, dropout and a classifier; declared in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(16, 10)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.classifier(self.drop(x.mean((2, 3))))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, update: Callable[[], object] | None = None
) -> None:
    """Forward, backward and update of one batch.

    Args:
        model, optimizer: what learns.
        x, y: inputs, (batch, …), and labels, (batch,).
        update: ends the step. Default: the optimizer's own.
    """
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(x), y).backward()
    (update or optimizer.step)()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_notebook(file: Path, cells: Sequence[Any]) -> Path:
    """Write a notebook of these cells for Python's own kernel; gives its file."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), file)
    return file


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A folder with a file system of its own of so many bytes, such as `64k`, while the block runs.

    Skips the test where none may be mounted.
    """
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system, which takes root")
    try:
        yield folder
    finally:
        # Lazily, since what runs there may hold a file open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_memory(size: int) -> Iterator[Callable[[], None]]:
    """What a process calls so that the system kills one of it and all that it starts when they take more bytes.

    Skips the test where no such group of processes may be made.
    """
    entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = [entry[2] for entry in entries if "memory" in entry[1].split(",")]
    second = [entry[2] for entry in entries if not entry[1]]
    folder = Path("/sys/fs/cgroup", *(["memory", first[0].strip("/")] if first else [second[0].strip("/")]),
                  f"layerlab-test-{os.getpid()}")
    limit = folder / ("memory.limit_in_bytes" if first else "memory.max")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs to make a control group, which takes root")
    try:
        if not limit.exists():
            pytest.skip("needs a control group for memory")
        limit.write_text(str(size))
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        deadline = time.monotonic() + 30
        while folder.exists():
            # Those that were killed leave it a moment later.
            with contextlib.suppress(OSError):
                folder.rmdir()
            assert time.monotonic() < deadline, f"{folder} has processes in it"
            time.sleep(0.1)


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path], address: str, *, seconds: float = 180, grace: float = 0, cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A server that has begun to answer at an address; it is ended after the block, with all its processes.

    Args:
        seconds: that it may take until it answers.
        grace: seconds that it has to end what it started by itself, once it is asked to; then it is killed.
        cwd, env: as `subprocess.Popen`.
    """
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd, env=env, start_new_session=True)
        try:
            deadline = time.monotonic() + seconds
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address).read()
                    break
                ended, late = server.poll() is not None, time.monotonic() > deadline
                if ended or late:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-2000:]
                    raise AssertionError(f"{command} {'has ended' if ended else 'does not answer'}: {said}")
                time.sleep(0.2)
            yield
        finally:
            if grace:
                server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[Any]:
    """A selenium driver of a Chromium whose window, shown to nobody, has so many pixels; or a skip: what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(flag)
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()
