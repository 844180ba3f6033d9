"""Progress of runs and epochs: bars for a person, or events in a file for whoever started this process.

A notebook that runs under `layerlab reproduce` has no terminal. There `$LAYERLAB_PROGRESS` names a file to which one
JSON line an epoch is appended; the runner draws the bars.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

VARIABLE = "LAYERLAB_PROGRESS"


class Bars:
    """Two bars: runs of a notebook or a comparison, and epochs of the current run.

    Args:
        file: where to draw; standard error by default.
        position: lines below the cursor at which the first bar stands.
        plain: one line a run instead of bars, for logs.
    """

    def __init__(self, file: TextIO | None = None, position: int = 0, plain: bool = False) -> None:
        self._options: dict[str, Any] = {"file": file or sys.stderr, "leave": False, "dynamic_ncols": True}
        self._position = position
        self._plain = plain
        self._runs: Any = None
        self._epochs: Any = None

    def update(self, event: dict[str, Any]) -> None:
        """Draw one event as `report` makes it."""
        if self._plain:
            if event["epoch"] == event["epochs"]:
                print(f"  run {event['run']}: {event['text']}", file=self._options["file"], flush=True)
            return
        if self._runs is None or self._runs.total != event["total"]:
            self.close()
            self._runs = tqdm(total=event["total"], desc="runs  ", unit="epoch", position=self._position,
                              **self._options)
            self._epochs = tqdm(total=event["epochs"], desc="epochs", unit="epoch", position=self._position + 1,
                                **self._options)
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
        # Of the processes of a torchrun job the first alone reports.
        first = os.environ.get("RANK", "0") == "0"
        self._file = os.environ.get(VARIABLE) if first else None
        self._bars = Bars() if show and first and not self._file else None

    def epoch(self, run: str, epoch: int, epochs: int, text: str) -> None:
        """Report that `run` has finished `epoch` of `epochs`."""
        self.done += 1
        event = {"total": self.total, "done": self.done, "run": run, "epoch": epoch, "epochs": epochs, "text": text}
        if self._file:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")
        elif self._bars is not None:
            self._bars.update(event)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.close()
