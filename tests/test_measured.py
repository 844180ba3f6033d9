"""A table that took long to measure is there when its notebook goes on, and only where it is still the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from layerlab import Session
from layerlab.runs import session as module
from layerlab.runs.measured import measured


class Measuring:
    """A function that counts how often it measures."""

    __qualname__ = "measuring"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, names: list[str], rounds: int = 3, result: Any = None) -> pd.DataFrame:
        self.calls += 1
        columns = {"network": names, "seconds": [0.1 * rounds] * len(names), "real": [True] * len(names),
                   "batch": [40] * len(names), "high": [float("nan")] * len(names)}
        return pd.DataFrame({**columns, **(result or {})}).set_index(["network", "batch"])


@pytest.fixture
def opened(tmp_path) -> Callable[[], Session]:
    return lambda: Session("test", "a title", tmp_path, {"lr": 0.1})


def test_a_notebook_that_goes_on_finds_what_it_measured_as_it_was(opened):
    measuring = Measuring()
    first = opened().measure("times", measuring, ["a", "b"], rounds=7)
    again = opened().measure("times", measuring, ["a", "b"], rounds=7)
    assert measuring.calls == 1
    pd.testing.assert_frame_equal(again, first)


def test_what_was_asked_otherwise_is_measured(opened):
    measuring = Measuring()
    opened().measure("times", measuring, ["a"])
    for title, names, rounds in (("others", ["a"], 3), ("times", ["b"], 3), ("times", ["b"], 4)):
        opened().measure(title, measuring, names, rounds=rounds)
    assert measuring.calls == 4


def test_another_machine_measures_for_itself(opened, monkeypatch):
    measuring = Measuring()
    opened().measure("times", measuring, ["a"])
    monkeypatch.setattr(module, "machine_name", lambda: "another")
    opened().measure("times", measuring, ["a"])
    assert measuring.calls == 2


def test_a_session_that_ended_leaves_nothing_and_the_next_one_measures(opened, tmp_path):
    measuring = Measuring()
    session = opened()
    session.measure("times", measuring, ["a"])
    session.close()
    assert not list(tmp_path.rglob("*.parquet"))
    opened().measure("times", measuring, ["a"])
    assert measuring.calls == 2


def test_what_no_file_gives_back_is_measured_each_time(opened):
    measuring = Measuring()
    for _ in range(2):
        frame = opened().measure("times", measuring, ["a", "b"], result={"mixed": [1, "one"]})
        assert list(frame["mixed"]) == [1, "one"]
    assert measuring.calls == 2


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet"])
def test_a_file_that_is_damaged_or_a_link_is_measured_anew(tmp_path, content):
    old, new = pd.DataFrame({"seconds": [0.5]}), pd.DataFrame({"seconds": [0.25]})
    file = tmp_path / "times.parquet"
    for of, made, given in (("one", old, old), ("one", new, old), ("other", new, new)):
        assert measured(file, of, made.copy).equals(given)
    file.write_bytes(content)
    assert measured(file, "other", old.copy).equals(old)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert measured(file, "other", new.copy).equals(new)


def test_a_folder_that_cannot_be_written_loses_no_table(opened, tmp_path):
    session = opened()
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.warns(match=r"The table 'times' is not kept for a notebook that goes on: "):
        frame = session.measure("times", Measuring(), ["a"])
    assert len(frame) == 1
