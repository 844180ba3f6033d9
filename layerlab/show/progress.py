"""Progress: bars for a person, lines for a log, or events in a file for whoever started this process.

A notebook that something else runs has no terminal. There `$LAYERLAB_PROGRESS` names a file to which JSON lines are
appended, one a cell and one an epoch; the starter draws them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from layerlab.base.errors import LayerlabWarning
from layerlab.base.screen import printable
from layerlab.show import alive
from layerlab.show.countdown import Countdown

VARIABLE = "LAYERLAB_PROGRESS"
# Characters: the longest label, the shortest and the longest bar.
_LABEL, _SHORTEST, _LONGEST = 28, 8, 40
# Columns below which a bar has no room for two times.
_NARROW = 72
_HTML = '<pre style="line-height: normal">{code}</pre>'


def first_process() -> bool:
    """Whether this is the first process of those that torchrun started, or the only one: it alone writes and logs."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def say_not_first() -> None:
    """Tell, once, that this process writes nothing."""
    say(f"RANK={os.environ.get('RANK')} is set, so this process trains with others, of which the first alone writes "
        "checkpoints and logs to MLflow; unset RANK if it trains alone.")


def report(event: dict[str, Any]) -> bool:
    """Append an event to the file that `$LAYERLAB_PROGRESS` names; says whether there is one.

    Whoever follows the file has made it: one that is not there is followed by nobody, and is not made here.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return False
    try:
        with open(file, "a", encoding="utf-8", opener=_open_made) as stream:
            stream.write(json.dumps(event) + "\n")
    except FileNotFoundError:
        return False
    except OSError:
        # A full disk takes the bars away and nothing else.
        pass
    return True


def _open_made(file: str, flags: int) -> int:
    return os.open(file, flags & ~os.O_CREAT)


def say(sentence: str) -> None:
    """Tell a person something that the work goes on without: above the bars of whoever started this process, else as a
    warning."""
    if not report({"say": sentence}):
        warnings.warn(sentence, LayerlabWarning, stacklevel=2)


@contextlib.contextmanager
def followed(
    file: Path, tell: Callable[[dict[str, Any]], None], tick: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Tell each event of a file, in a thread, while the block runs.

    Args:
        tick: called some times a second.
    """
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
                tick()
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
            with followed(file, lambda event: board.event(label, event), board.tick):
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


def times(spent: float, left: float | None) -> str:
    """`1:10, 3:05 left`: what was spent, and what is left where that is known."""
    return f"{clock(spent)}, {clock(left)} left" if left else clock(spent)


class Bar(NamedTuple):
    """A line of progress.

    Attributes:
        label: names it.
        share: how much is done, from 0 to 1.
        text: what is going on.
        times: the time spent and the time left, in words.
    """

    label: str
    share: float
    text: str = ""
    times: str = ""


class Bars:
    """Bars below what a terminal or a notebook's cell shows; nothing but lines elsewhere.

    They are drawn when something has happened and by the thread that says so: one that draws all the time would take
    time from what is measured.

    Args:
        file: where to draw; standard error by default.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        from rich.console import Console

        self._file = file or sys.stderr
        self._terminal = self._file.isatty()
        self._console = Console(file=self._file, highlight=False)
        self._notebook = self._console.is_jupyter
        if self._notebook:
            # It is asked for its HTML, and its lines are as long as a cell of JupyterLab has room for.
            self._console = Console(file=io.StringIO(), force_terminal=True, force_jupyter=False,
                                    color_system="truecolor", record=True, width=100)
        self.drawn = self._terminal or self._notebook
        self._bars: dict[str, Bar] = {}
        self._live: Any = None

    def show(self, bars: Mapping[str, Bar]) -> None:
        """Draw bars, each under the key that it is changed and removed by."""
        self._bars |= bars
        self._refresh()

    def remove(self, key: str) -> None:
        """Take a bar away."""
        if self._bars.pop(key, None):
            self._refresh()

    def line(self, text: str) -> None:
        """Write a line above the bars."""
        if self._terminal:
            self._console.print(printable(text), markup=False, emoji=False, soft_wrap=True)
        else:
            self._file.write(f"{printable(text)}\n")
            self._file.flush()

    def close(self) -> None:
        """Take the bars away."""
        self._bars = {}
        if self._live is None:
            return
        if self._notebook:
            self._live.update({"text/plain": "", "text/html": ""}, raw=True)
        else:
            self._live.stop()
        self._live = None

    def _refresh(self) -> None:
        if self._notebook:
            self._draw_in_notebook()
        elif self._terminal:
            self._draw_at_terminal()

    def _draw_at_terminal(self) -> None:
        if self._live is None:
            from rich.live import Live

            # What others print goes above the bars, unless it goes to a file.
            self._live = Live(
                console=self._console, get_renderable=self._drawing, auto_refresh=False, transient=True,
                redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
        self._live.refresh()

    def _draw_in_notebook(self) -> None:
        """Show HTML that is changed in place. rich's own way needs a widget, which leaves an empty output behind."""
        from IPython.display import display

        self._console.print(self._drawing())
        text = self._console.export_text(clear=False)
        shown = {"text/plain": text, "text/html": self._console.export_html(inline_styles=True, code_format=_HTML)}
        if self._live is None:
            self._live = display(shown, raw=True, display_id=True)
        else:
            self._live.update(shown, raw=True)

    def _drawing(self) -> Any:
        """The bars as a grid of label, bar, text and times; the text is cut where the width is short."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid
        from rich.text import Text

        bars = list(self._bars.values())
        if self._console.width < _NARROW:
            # The time left says more than the time spent.
            bars = [bar._replace(times=bar.times.rpartition(", ")[2]) for bar in bars]
        labels = min(_LABEL, self._console.width // 3, max((cell_len(bar.label) for bar in bars), default=0))
        times = max((cell_len(bar.times) for bar in bars), default=0)
        # Three blanks stand between the four columns.
        room = max(2 * _SHORTEST, self._console.width - labels - times - 3)
        length = min(_LONGEST, max(_SHORTEST, room // 5))
        grid = Grid.grid(padding=(0, 1, 0, 0))
        for width in (labels, length, room - length, times):
            grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
        for bar in bars:
            drawn = ProgressBar(1.0, min(bar.share, 1.0), complete_style="green", finished_style="green")
            grid.add_row(Text(printable(bar.label)), drawn, Text(printable(bar.text)), Text(bar.times))
        return grid


class _Row:
    """What is known of a notebook at work.

    Args:
        begin: when it began, by the monotonic clock.
        last: how many seconds it took last time.
    """

    def __init__(self, begin: float, last: float | None) -> None:
        self.begin = begin
        self._last = last
        self._cell, self._cells, self._inner = -1, 1, 0.0
        self._heading, self._training = "", ""
        self._countdown = Countdown(begin)

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """Note an event as `report` writes it."""
        if "cells" in event:
            self._cell, self._cells, self._inner = event["cell"], event["cells"], 0.0
            self._heading, self._training = event.get("heading", ""), ""
            # Of a cell, nothing is measured before it trains.
            self._countdown = Countdown(now)
        elif "epoch" in event:
            self._inner = event["done"] / event["total"]
            self._training = f"{event['run']}, epoch {event['epoch']} of {event['epochs']}"
            self._countdown.done(event["done"], event["total"], now)

    def bar(self, label: str, now: float) -> Bar:
        """The notebook's bar at a moment."""
        spent = now - self.begin
        if self._cell < 0:
            return Bar(label, 0.0, "starting", clock(spent))
        # What it took last time knows all cells; the epochs know the training at work.
        left = self._countdown.left(now)
        if self._last and self._last > spent:
            left = max(self._last - spent, left or 0.0)
        what = self._training or self._heading
        text = f"cell {self._cell + 1} of {self._cells}{', ' if what else ''}{what}"
        return Bar(label, (self._cell + self._inner) / self._cells, text, times(spent, left))


class Board:
    """Several notebooks at once: one bar each with cell, epoch, time spent and time left; lines where there is no
    terminal.

    Args:
        file: where to draw; standard error by default.
        total: notebooks of the whole batch, for a first bar; none for a single one.
    """

    def __init__(self, file: TextIO | None = None, total: int = 0) -> None:
        self._bars = Bars(file)
        self._lock = threading.RLock()
        self._rows: dict[str, _Row] = {}
        self._begin = time.monotonic()
        self._total = total if total > 1 else 0
        self._done = 0
        self._countdown = Countdown(self._begin)
        self._drawn = self._begin

    def _draw(self) -> None:
        """Draw the bars of the notebooks at work, and that of the batch above them."""
        bars, now = {}, time.monotonic()
        if self._total:
            text = f"{self._done} of {self._total} notebooks"
            bars[""] = Bar("batch", self._done / self._total, text,
                           times(now - self._begin, self._countdown.left(now)))
        self._drawn = now
        self._bars.show({**bars, **{label: row.bar(label, now) for label, row in self._rows.items()}})

    def tick(self) -> None:
        """Bring the times up to date, at most once a second: somebody waits for what another process does."""
        with self._lock:
            if self._rows and self._bars.drawn and time.monotonic() - self._drawn >= 1:
                self._draw()

    def line(self, text: str) -> None:
        """Write a line above the bars."""
        with self._lock:
            self._bars.line(text)

    def start(self, label: str, last: float | None = None) -> None:
        """A notebook begins.

        Args:
            label: names it from here on.
            last: how many seconds it took last time.
        """
        with self._lock:
            self._rows[label] = _Row(time.monotonic(), last)
            if self._bars.drawn:
                self._draw()
            else:
                self.line(f"{label}: started" + (f", last time {clock(last)}" if last else ""))

    def event(self, label: str, event: dict[str, Any]) -> None:
        """Draw one event as `report` writes it."""
        with self._lock:
            row = self._rows.get(label)
            if row is None:
                return
            if "say" in event or "again" in event:
                self.line(f"{label}: " + (event.get("say") or f"{event['again']} It is started again."))
                return
            row.take(event, time.monotonic())
            if not self._bars.drawn and "epoch" in event and event["epoch"] == event["epochs"]:
                self.line(f"{label}: {event['run']}: {event['text']}")
            self._draw()

    def end(self, label: str, text: str) -> None:
        """A notebook has ended, as the text says."""
        with self._lock:
            row = self._rows.pop(label, None)
            if row is None:
                return
            self._bars.remove(label)
            self.line(f"{label}: {text} after {clock(time.monotonic() - row.begin)}")
            self._countdown.done(self._done + 1, self._total, time.monotonic())
            self.step()

    def step(self) -> None:
        """One notebook of the batch is done with."""
        with self._lock:
            self._done += 1
            self._draw()

    def close(self) -> None:
        """Take the bars away."""
        with self._lock:
            self._rows = {}
            self._bars.close()


class Progress:
    """Progress over the epochs of several runs: a bar for all of them, and one for the current run.

    Args:
        total: epochs of all runs together.
        show: draw it, or write a line a run where there is no terminal, when there is no event file.
    """

    def __init__(self, total: int, show: bool = True) -> None:
        self.total = total
        self.done = 0
        alive.end()
        self._begin = time.monotonic()
        self._countdown = Countdown(self._begin)
        self._reports = first_process()
        self._show = show and self._reports
        self._bars: Bars | None = None

    def epoch(self, run: str, epoch: int, epochs: int, text: str) -> None:
        """Report that `run` has finished `epoch` of `epochs`."""
        self.done += 1
        event = {"total": self.total, "done": self.done, "run": run, "epoch": epoch, "epochs": epochs, "text": text}
        if not self._reports or report(event) or not self._show:
            return
        self._bars = self._bars or Bars()
        if not self._bars.drawn:
            if epoch == epochs:
                self._bars.line(f"{run}: {text}")
            return
        now = time.monotonic()
        self._countdown.done(self.done, self.total, now)
        shown = times(now - self._begin, self._countdown.left(now))
        self._bars.show({"runs": Bar("all runs", self.done / self.total, f"{self.done} of {self.total} epochs", shown),
                         "run": Bar(run, epoch / epochs, f"epoch {epoch} of {epochs}, {text}")})

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.close()
