"""Progress: bars for a person, lines for a log, or events in a file for whoever started this process.

A notebook that something else runs has no terminal. There `$LAYERLAB_PROGRESS` names a file to which JSON lines are
appended, one a cell and one an epoch; the starter draws them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "LAYERLAB_PROGRESS"


def first_process() -> bool:
    """Whether this is the first process of those that torchrun started, or the only one: it alone writes and logs."""
    return os.environ.get("RANK", "0") == "0"


def report(event: dict[str, Any]) -> bool:
    """Append an event to the file that `$LAYERLAB_PROGRESS` names; says whether there is one."""
    file = os.environ.get(VARIABLE)
    if not file:
        return False
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(event) + "\n")
    return True


@contextlib.contextmanager
def followed(file: Path, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Tell each event of a file, in a thread, while the block runs."""
    file.touch()
    stop = threading.Event()

    def follow() -> None:
        with file.open(encoding="utf-8") as stream:
            rest = ""
            while True:
                ending = stop.is_set()
                rest += stream.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    # A writer that was killed in the middle of a line leaves one that is no JSON.
                    with contextlib.suppress(ValueError):
                        tell(json.loads(line))
                if ending:
                    return
                stop.wait(0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def drawn(label: str, show: bool = True) -> Iterator[None]:
    """Draw the progress of a notebook that runs in the block, on standard error."""
    if not show:
        yield
        return
    board = Board()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "progress.jsonl"
        os.environ[VARIABLE] = str(file)
        board.start(label)
        try:
            with followed(file, lambda event: board.event(label, event)):
                yield
        finally:
            del os.environ[VARIABLE]
            board.end(label, "ended")


def clock(seconds: float) -> str:
    """`42 s`, `3:05`, `2:03:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02}" if hours else f"{rest // 60}"
    return (f"{hours}:" if hours else "") + f"{minutes}:{rest % 60:02}"


class Board:
    """Several notebooks at once: one bar each with cell, epoch and time left; lines where there is no terminal.

    Args:
        file: where to draw; standard error by default.
        total: notebooks of the whole batch, for a last bar; none for a single one.
    """

    def __init__(self, file: TextIO | None = None, total: int = 0) -> None:
        self._file = file or sys.stderr
        self._terminal = self._file.isatty()
        self._lock = threading.RLock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._batch: Any = None
        if total > 1 and self._terminal:
            self._batch = self._bar(0, "batch", total, "{desc} {bar} {n_fmt} of {total_fmt} notebooks, {elapsed}")

    def _bar(self, position: int, label: str, total: float, form: str) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=f"{label[:28]:28}", position=position, leave=False, dynamic_ncols=True,
                    file=self._file, bar_format=form, unit="starting")

    def line(self, text: str) -> None:
        """Write a line above the bars."""
        from tqdm import tqdm

        with self._lock:
            tqdm.write(text, file=self._file)
            self._file.flush()

    def start(self, label: str, last: float | None = None) -> None:
        """A notebook begins.

        Args:
            label: names it from here on.
            last: how many seconds it took last time.
        """
        with self._lock:
            row: dict[str, Any] = {"begin": time.monotonic(), "last": last, "cell": 0, "cells": 1, "inner": 0.0}
            if self._terminal:
                taken = {other["position"] for other in self._rows.values()}
                row["position"] = next(n for n in range(1, len(taken) + 2) if n not in taken)
                row["bar"] = self._bar(row["position"], label, 1.0, "{desc} {bar} {unit}")
            else:
                self.line(f"{label}: started" + (f", last time {clock(last)}" if last else ""))
            self._rows[label] = row

    def event(self, label: str, event: dict[str, Any]) -> None:
        """Draw one event as `report` writes it."""
        with self._lock:
            row = self._rows.get(label)
            if row is None:
                return
            if "cells" in event:
                row |= {"cell": event["cell"], "cells": event["cells"], "inner": 0.0, "text": ""}
            elif "epoch" in event:
                row["inner"] = event["done"] / event["total"]
                row["text"] = f", {event['run']}, epoch {event['epoch']} of {event['epochs']}"
                if not self._terminal and event["epoch"] == event["epochs"]:
                    self.line(f"{label}: {event['run']}: {event['text']}")
            if self._terminal:
                share = (row["cell"] + row["inner"]) / row["cells"]
                spent = time.monotonic() - row["begin"]
                left = row["last"] - spent if row["last"] else spent * (1 - share) / share if share else 0.0
                row["bar"].n = min(share, 1.0)
                # Not as a postfix, before which tqdm writes a comma.
                row["bar"].unit = f"cell {row['cell'] + 1} of {row['cells']}{row.get('text', '')}" + (
                    f", {clock(left)} left" if left > 0 else "")
                row["bar"].refresh()
                if self._batch is not None:
                    self._batch.refresh()

    def end(self, label: str, text: str) -> None:
        """A notebook has ended, as the text says."""
        with self._lock:
            row = self._rows.pop(label, None)
            if row is None:
                return
            if "bar" in row:
                row["bar"].close()
            self.line(f"{label}: {text} after {clock(time.monotonic() - row['begin'])}")
            self.step()

    def step(self) -> None:
        """One notebook of the batch is done with."""
        if self._batch is not None:
            self._batch.update()

    def close(self) -> None:
        """Take the bars away."""
        with self._lock:
            for row in self._rows.values():
                if "bar" in row:
                    row["bar"].close()
            self._rows = {}
            if self._batch is not None:
                self._batch.close()
                self._batch = None


class Bars:
    """Two bars for a comparison in a terminal or a notebook of one's own: its epochs, and those of the current run."""

    def __init__(self) -> None:
        self._runs: Any = None
        self._epochs: Any = None

    def update(self, event: dict[str, Any]) -> None:
        """Draw one event as `report` writes it."""
        from tqdm.auto import tqdm

        if self._runs is None or self._runs.total != event["total"]:
            self.close()
            options: dict[str, Any] = {"unit": "epoch", "leave": False, "dynamic_ncols": True}
            self._runs = tqdm(total=event["total"], desc="runs  ", position=0, **options)
            self._epochs = tqdm(total=event["epochs"], desc="epochs", position=1, **options)
        self._runs.n = event["done"]
        self._runs.refresh()
        self._epochs.total = event["epochs"]
        self._epochs.n = event["epoch"]
        self._epochs.set_description(event["run"], refresh=False)
        self._epochs.set_postfix_str(event["text"])

    def close(self) -> None:
        """Take the bars away."""
        for bar in (self._runs, self._epochs):
            if bar is not None:
                bar.close()
        self._runs = self._epochs = None


class Progress:
    """Progress over the epochs of several runs.

    Args:
        total: epochs of all runs together.
        show: draw bars when there is no event file.
    """

    def __init__(self, total: int, show: bool = True) -> None:
        self.total = total
        self.done = 0
        self._reports = first_process()
        self._bars = Bars() if show and self._reports else None

    def epoch(self, run: str, epoch: int, epochs: int, text: str) -> None:
        """Report that `run` has finished `epoch` of `epochs`."""
        self.done += 1
        event = {"total": self.total, "done": self.done, "run": run, "epoch": epoch, "epochs": epochs, "text": text}
        if self._reports and not report(event) and self._bars is not None:
            self._bars.update(event)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.close()
