"""Progress: bars at a terminal and in a notebook, lines elsewhere."""

from __future__ import annotations

import io
import re

import nbclient
import nbformat
import pytest

from layerlab.base.errors import LayerlabWarning
from layerlab.show.countdown import Countdown
from layerlab.show.progress import Board, Progress, report, say


class Terminal(io.StringIO):
    """What calls itself a terminal and keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def events(board: Board, label: str) -> None:
    """A notebook of two cells, in the second of which two runs train for two epochs each."""
    board.start(label, last=3600.0)
    board.event(label, {"cell": 0, "cells": 2})
    board.event(label, {"cell": 1, "cells": 2})
    for done, (run, epoch) in enumerate([("plain seed 0", 1), ("plain seed 0", 2), ("mine seed 0", 1)], start=1):
        board.event(label, {"total": 4, "done": done, "run": run, "epoch": epoch, "epochs": 2,
                            "text": "loss 1.25, top-1 30.00%"})


def drawings(text: str) -> list[list[str]]:
    """What stood at the terminal one after the other, as lines without colours."""
    shown = re.split(r"\r?(?:\x1b\[2K|\x1b\[1A)+", text)
    return [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", part).splitlines() for part in shown]


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR", "TTY_INTERACTIVE"])
def test_where_there_is_no_terminal_a_notebook_is_a_few_lines(monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    stream = io.StringIO()
    board = Board(stream, total=2)
    events(board, "mine quick")
    board.event("somebody else", {"cell": 1, "cells": 2})
    board.end("mine quick", "finished")
    board.close()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["mine quick: started, last time 1:00:00", "mine quick: plain seed 0: loss 1.25, top-1 30.00%"]
    assert [re.sub(r"\d+ s", "n s", line) for line in lines[2:]] == ["mine quick: finished after n s"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_a_bar_for_the_batch_and_one_for_each_notebook(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    board = Board(stream, total=3)
    events(board, "mine quick")
    events(board, "another-with-a-very-long-name cpu seed=3")
    shown = drawings(stream.getvalue())[-1]
    assert [line.split()[0].rstrip("…") for line in shown][:2] == ["batch", "mine"]
    assert shown[2].startswith("another-with-a-very")
    assert "0 of 3 notebooks" in shown[0]
    assert "cell 2 of 2, mi" in shown[1]
    assert re.search(r"\d+:\d\d left$", shown[1].rstrip())
    assert all(len(line) <= width for lines in drawings(stream.getvalue()) for line in lines)
    board.end("mine quick", "finished")
    board.line("A line [bold] \x1b[31m")
    board.close()
    text = stream.getvalue()
    assert "mine quick: finished after" in text
    assert "A line [bold] \\x1b[31m" in text
    assert any("1 of 3 notebooks" in line for lines in drawings(text) for line in lines)
    # Nothing is left of the bars, and the cursor is back.
    assert drawings(text)[-1] == []
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_comparison_outside_a_terminal_writes_a_line_a_run(capsys):
    progress = Progress(4)
    for run in ("plain seed 0", "mine seed 0"):
        for epoch in (1, 2):
            progress.epoch(run, epoch, 2, f"loss {epoch}")
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["plain seed 0: loss 2", "mine seed 0: loss 2"]


def test_nothing_is_shown_when_asked_so_or_when_somebody_follows_the_events(capsys, monkeypatch, tmp_path):
    Progress(1, show=False).epoch("plain", 1, 1, "loss")
    monkeypatch.setenv("LAYERLAB_PROGRESS", str(tmp_path / "events"))
    (tmp_path / "events").touch()
    assert report({"cell": 1})
    Progress(1).epoch("plain", 1, 1, "loss")
    assert capsys.readouterr().err == ""
    assert len((tmp_path / "events").read_text().splitlines()) == 2


def test_events_that_nobody_follows_make_no_file_and_a_sentence_among_them_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLAB_PROGRESS", "left-over")
    assert not report({"cell": 1})
    with pytest.warns(LayerlabWarning, match="mind the gap"):
        say("mind the gap")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_two_bars_while_it_trains_and_keeps_nothing_of_them(monkeypatch):
    monkeypatch.delenv("LAYERLAB_PROGRESS", raising=False)
    cells = ["from layerlab.show.progress import Progress\nprogress = Progress(4)\n"
             "progress.epoch('mine <seed 0>', 1, 2, 'loss 1.25')\nprogress.epoch('mine <seed 0>', 2, 2, 'loss 1.10')",
             "progress.close()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(book)
    with client.setup_kernel():
        client.execute_cell(book.cells[0], 0)
        (output,) = book.cells[0].outputs
        lines = output.data["text/plain"].splitlines()
        assert [line.split()[0] for line in lines] == ["all", "mine"]
        assert "2 of 4 epochs" in lines[0]
        assert "epoch 2 of 2, loss 1.10" in lines[1]
        assert "mine &lt;seed 0&gt;" in output.data["text/html"]
        client.execute_cell(book.cells[1], 1)
    (output,) = book.cells[0].outputs
    assert set(output.data.values()) == {""}
    assert "widgets" not in book.metadata


def test_the_time_left_counts_down_and_grows_for_a_reason_alone():
    countdown = Countdown(100.0)
    assert countdown.left(130.0) is None
    told = []
    # Ten epochs of about ten seconds: the third one is a little longer, and nothing is said of that.
    for number, now in enumerate((110.0, 120.0, 131.0, 141.0, 150.0), start=1):
        countdown.done(number, 10, now)
        told += [countdown.left(now), countdown.left(now + 5)]
    assert told[:2] == [90, 85]
    assert told == sorted(told, reverse=True)
    # Epochs that take three times as long are a reason.
    countdown.done(6, 10, 200.0)
    assert countdown.left(200.0) > told[-1]
    # So are more epochs; where it was wrong it says nothing rather than nought.
    before = countdown.left(200.0)
    countdown.done(7, 100, 210.0)
    assert countdown.left(210.0) > before
    assert countdown.left(10_000.0) is None


def test_epochs_of_an_interrupted_process_are_not_taken_for_quick_ones():
    countdown = Countdown(0.0)
    countdown.done(51, 100, 10.0)
    assert countdown.left(10.0) == 490


def test_the_bars_tell_the_time_also_while_nothing_happens(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("layerlab.show.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    board = Board(stream, total=2)
    board.start("lr=0.1 · mine quick")
    board.event("lr=0.1 · mine quick", {"cell": 4, "cells": 9, "heading": "Side by side"})
    clock[0] += 10
    board.event("lr=0.1 · mine quick", {"total": 7, "done": 1, "run": "plain seed 0", "epoch": 1, "epochs": 2,
                                        "text": "loss 1.25"})
    clock[0] += 5.4
    board.tick()
    clock[0] += 0.1
    board.tick()
    shown = [lines[-1] for lines in drawings(stream.getvalue()) if len(lines) == 2]
    assert "cell 5 of 9, Side by side" in shown[-3]
    assert [re.search(r"\d+ s.*$", line)[0].strip() for line in shown[-2:]] == ["10 s, 1:00 left", "15 s, 55 s left"]
    assert all(line.startswith("lr=0.1 · mine quick") and len(line) <= 80 for line in shown)
    board.close()
