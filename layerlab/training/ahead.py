"""Seeds of a comparison trained ahead, each in a process of its own, into the checkpoints that the comparison reads.

A small network leaves most of a GPU idle, since one process cannot start kernels quickly enough. A process that trains
ahead writes the same checkpoints as the comparison would, and nothing else. The comparison then finds these trainings
finished; where a process failed, it trains them itself, from the last epoch that was written.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import cloudpickle

from layerlab.base.processes import import_path
from layerlab.show.progress import VARIABLE, say

Training = Callable[[int], object]


class Ahead:
    """Trains seeds but for the first ahead: `with Ahead(train, seeds, 3) as ahead: …; ahead.wait(seed)`.

    Args:
        train: trains one seed into its checkpoints; it travels to other processes with all that it holds.
        seeds: of the comparison.
        at_once: seeds at a time, that of the calling process included; 1 trains none ahead.
    """

    def __init__(self, train: Training, seeds: Sequence[int], at_once: int) -> None:
        self._pending: dict[int, Future[None]] = {}
        self._running: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()
        self._over = False
        self._waits = threading.Event()
        if at_once == 1 or len(seeds) == 1:
            return
        try:
            sent = cloudpickle.dumps(train)
        # Whatever a network's builder or a strategy may hold: a lock, a generator, a file.
        except Exception as error:
            say("Seeds are trained one after the other, since what is trained cannot be sent to another process: "
                f"{error}")
            return
        pool = self._stack.enter_context(ThreadPoolExecutor(at_once))
        # One place is the calling process's, until it has nothing left to do but to wait.
        pool.submit(self._waits.wait)
        self._pending = {seed: pool.submit(self._run, sent, seed) for seed in seeds[1:]}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        for each in self._pending.values():
            each.cancel()
        self._waits.set()
        for process in self._running:
            process.kill()
        self._stack.close()

    def wait(self, seed: int) -> None:
        """Until nothing trains the seed any more; meanwhile one more is trained ahead, in the caller's place."""
        if seed in self._pending:
            self._waits.set()
            self._pending[seed].result()

    def _run(self, sent: bytes, seed: int) -> None:
        environment = os.environ | {"PYTHONPATH": import_path()}
        try:
            process = subprocess.Popen([sys.executable, "-m", "layerlab.training.ahead", str(seed)], env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except OSError as error:
            say(f"Seed {seed} could not be trained ahead and is trained here: {error}")
            return
        self._running.append(process)
        if self._over:
            process.kill()
        _, said = process.communicate(sent)
        if process.returncode > 0:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            say(f"Seed {seed} could not be trained ahead and is trained here: {''.join(last)}")


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _main() -> None:
    (seed,) = sys.argv[1:]
    # It was started with the variable, so that whoever ends the notebook finds this process; its epochs are not told.
    os.environ.pop(VARIABLE, None)
    threading.Thread(target=_leave_with, args=[os.getppid()], daemon=True).start()
    train = cloudpickle.load(sys.stdin.buffer)
    with contextlib.redirect_stdout(sys.stderr):
        train(int(seed))


if __name__ == "__main__":
    _main()
