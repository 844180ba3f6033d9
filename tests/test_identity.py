"""What a result rests on: what a notebook used, which run is a profile's own, and what differs between two."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import sqlite3
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from fake_paper import FINISH, OPEN, TRAIN
from helpers import slow, write_notebook
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell
from PIL import Image

from layerlab import LayerlabError, Study
from layerlab.base import usage
from layerlab.base.cache import remembered
from layerlab.base.digests import file_digest
from layerlab.base.files import write_json
from layerlab.contract.rows import counts
from layerlab.reporting.diff import diff
from layerlab.reporting.publish import publish
from layerlab.reporting.scoreboard import collect, scoreboard_table
from layerlab.runs import tracking
from layerlab.runs.batch.local import preview, run_batch
from layerlab.runs.jobs import Job, notebook_job, paper_job
from layerlab.runs.record import read_results
from layerlab.show.stamp import stamped


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Job]:
    """The job of a notebook that reads a table, imports a module beside it, loads images and lists strategies."""
    home = tmp_path / "home"
    (home / "notebooks").mkdir(parents=True)
    monkeypatch.setenv("LAYERLAB_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "values.csv").write_text("1\n2\n")
    (home / "notebooks" / "beside.py").write_text('"""A module."""\nFACTOR = 2\n')
    for name, level in (("bright", 200), ("dark", 40)):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.full((8, 8, 3), level + number, np.uint8)).save(folder / f"{number}.png")
    cells = ["images = 'images'  # a folder",
             "import beside\nfrom layerlab import load_dataset, strategies",
             "values = [beside.FACTOR * float(line) for line in open('values.csv')]",
             "from layerlab import explore\ndata = load_dataset(images, image_size=8)\narms = explore.make_arms()",
             "open('written.txt', 'w').write('x')\nopen('written.txt').read()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells[0].metadata["tags"] = ["parameters"]
    file = home / "notebooks" / "reader.ipynb"
    nbformat.write(book, file)
    return lambda: notebook_job(file)


@pytest.mark.parametrize("root", ["", pytest.param("/nowhere", marks=slow)])
def test_finished_before_says_what_was_compared_and_runs_again_what_changed(job, tmp_path, monkeypatch, root):
    monkeypatch.setenv("LAYERLAB_DATA", root)
    assert [outcome.status for outcome in run_batch([job()])] == ["finished"]
    outcome, = run_batch([job()])
    assert outcome.status == "done before"
    assert "1 dataset" in outcome.message

    def changed() -> str:
        (_, status, why), = preview([job()])
        return why if status == "runs" else status

    assert changed() == "done before"
    values, beside = tmp_path / "values.csv", tmp_path / "home" / "notebooks" / "beside.py"
    values.write_text("1\n3\n")
    assert "values.csv was edited" in changed()
    values.write_text("1\n2\n")
    assert changed() == "done before"
    values.rename(tmp_path / "away.csv")
    assert "values.csv is gone" in changed()
    (tmp_path / "away.csv").rename(values)
    beside.write_text('"""Another text."""\n# a comment\nFACTOR = 2\n')
    assert changed() == "done before"
    beside.write_text("FACTOR = 3\n")
    assert "beside.py was edited" in changed()
    beside.write_text("FACTOR = 2\n")
    (tmp_path / "written.txt").write_text("y")
    assert changed() == "done before"
    # The same folder of images under another start, another root of datasets, one more strategy.
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    monkeypatch.chdir(other)
    assert f"it is started in {other}" in changed()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as here:
        here.setenv("LAYERLAB_DATA", str(other))
        assert "LAYERLAB_DATA is" in changed()
    point = importlib.metadata.EntryPoint("one-more", "nowhere:Nothing", "layerlab.strategies")
    with monkeypatch.context() as here:
        found = importlib.metadata.entry_points
        here.setattr(importlib.metadata, "entry_points", lambda **of: [*found(**of), point])
        assert "strategy one-more was installed" in changed()
    assert changed() == "done before"
    image = tmp_path / "images" / "train" / "dark" / "0.png"
    status = image.stat()
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "the data in images changed" in changed()
    assert [outcome.status for outcome in run_batch([job()])] == ["finished"]


@slow
def test_a_papers_notebook_that_is_tracked_is_finished_before_wherever_it_is_asked_for(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(OPEN, TRAIN, FINISH)
    assert [outcome.status for outcome in run_batch([paper_job("fake")])] == ["finished"]
    assert paper_job("fake").state().done, paper_job("fake").state()
    # Another run writes to the same database, and the command is given in another folder.
    Study("fake", "cpu", output=tmp_path / "other").finish()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [outcome.status for outcome in run_batch([paper_job("fake")])] == ["done before"]


def test_what_is_edited_while_it_is_used_does_not_count_as_known(tmp_path):
    recorder, file = usage.start(), tmp_path / "table.csv"
    file.write_text("1")
    # Written by another process, as it were.
    recorder._written.clear()
    assert file.read_text() == "1"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    used = recorder.content()
    assert usage.changes(used, os.getcwd()) == [f"{file} was edited while it was in use"]


def test_what_a_process_writes_itself_is_nothing_that_it_rests_on(tmp_path):
    recorder = usage.start()
    for write in (lambda file: file.write_text("1"), lambda file: write_json(file, {"a": 1})):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        write(file)
        assert file.read_text()
        write(file)
    assert [path for path in recorder.content()["files"] if str(tmp_path) in path] == []


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_database_that_was_only_read_counts_and_one_that_was_written_does_not(tmp_path, journal):
    def run(file: str, command: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(file)) as connection, connection:
            return connection.execute(command).fetchall()

    read, written = str(tmp_path / "100% read#.db"), str(tmp_path / "written.db")
    for file in (read, written):
        run(file, f"PRAGMA journal_mode = {journal}")
        run(file, "CREATE TABLE numbers (n)")
    recorder = usage.start()
    # Without the line by which it is open all the time, the last one to close would clear the journal away.
    kept = sqlite3.connect(f"{Path(read).as_uri()}?mode=ro", uri=True)
    assert kept.execute("SELECT * FROM numbers").fetchall() == []
    run(written, "INSERT INTO numbers VALUES (1)")
    sqlite3.connect(":memory:").close()
    used = recorder.content()
    assert list(used["databases"]) == [read]
    assert [path for path in used["files"] if str(tmp_path) in path] == []
    assert usage.counted(used).endswith("1 database, 0 datasets")
    run(written, "INSERT INTO numbers VALUES (2)")
    assert usage.changes(used, os.getcwd()) == []
    run(read, "INSERT INTO numbers VALUES (3)")
    assert usage.changes(used, os.getcwd()) == [f"{read} was written to"]
    kept.close()
    assert usage.changes(used, os.getcwd()) == [f"{read} was written to"]


@slow
def test_a_scoreboard_is_made_again_when_runs_are_added_and_not_otherwise(fake, tmp_path):
    fake()
    job = notebook_job(write_notebook(tmp_path / "home" / "notebooks" / "board.ipynb",
                                      [new_code_cell("from layerlab import scoreboard\nscoreboard.collect(['fake'])")]))

    def again() -> str:
        (outcome,) = run_batch([job])
        return outcome.status

    assert [again(), again()] == ["finished", "done before"]
    for number in range(2):
        Study("fake", "cpu", output=tmp_path / f"run{number}").finish()
        assert [again(), again()] == ["finished", "done before"]


def test_comments_and_docstrings_are_no_other_code(tmp_path):
    file = tmp_path / "code.py"
    digests = []
    for text in ('"""A."""\ndef f(x):\n    """B."""\n    return x\n', "# C\ndef f(x):\n    return x\n",
                 "def f(x):\n    return -x\n", "def f(x:\n"):
        file.write_text(textwrap.dedent(text))
        digests.append(file_digest(file))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert "" not in digests
    assert file_digest(tmp_path / "none.py") == ""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, int]]:
    """What is remembered of a file that was edited long ago, and how often it was made anew."""
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 60)
    file, calls = tmp_path / "file.txt", []

    def make(path: Path) -> str:
        calls.append(path)
        return path.read_text()

    def ask(content: str = "", maker: str = "1") -> tuple[str, int]:
        if content:
            times = file.stat() if file.exists() else None
            file.write_text(content)
            if times:
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        return remembered(file, "texts", maker, make), len(calls)

    return ask


def test_what_is_remembered_of_a_file_is_made_anew_after_an_edit_and_by_another_maker(made):
    assert [made("one"), made(), made()] == [("one", 1)] * 3
    # As long, at the same time of the last change.
    assert made("two") == ("two", 2)
    assert made(maker="2") == ("two", 3)
    assert made(maker="2") == ("two", 3)


@pytest.mark.parametrize("content", ["", "1 ", "1 x y z\n", "\xff"])
def test_a_damaged_memory_of_a_file_is_not_believed(made, tmp_path, content):
    made("one")
    (memory,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    memory.write_text(content, encoding="latin-1")
    assert [made(), made()] == [("one", 2)] * 2


def test_a_file_that_may_change_within_a_tick_is_not_remembered(tmp_path):
    (tmp_path / "file.txt").write_text("one")
    assert remembered(tmp_path / "file.txt", "texts", "1", Path.read_text) == "one"
    assert not (tmp_path / "cache").exists()


def test_without_a_cache_everything_is_made_anew(made, monkeypatch):
    monkeypatch.setenv("LAYERLAB_CACHE", "/dev/null/cache")
    assert [made("one"), made()] == [("one", 1), ("one", 2)]


def _study(gains: list[float], seeds: list[int], **changed: object) -> Study:
    study = Study("fake", "cpu", output=Path("out") / f"{len(list(Path('out').glob('*')))}", **changed)
    study.claim("gain", gains, seeds=seeds, conditions={"dataset": "digits"})
    figure = Figure(figsize=(3, 2))
    # Another picture for other parameters: a page shows equal ones once.
    figure.add_subplot().plot([1, 2 + len(changed)])
    study.figure("curve", figure)
    study.finish()
    return study


def test_a_profiles_result_is_a_run_with_exactly_its_parameters(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake()
    own = _study([2.0, 2.1, 2.2], [0, 1, 2])
    other = _study([0.2], [0], pause=1.0)
    ids = [{row.result for row in read_results(study.folder)}.pop() for study in (own, other)]
    assert len(set(ids)) == 2
    rows = collect(["fake"])
    assert [(row.measured, row.changed, row.result) for row in rows] == [
        (pytest.approx(2.1), {}, ids[0]), (0.2, {"pause": 1.0}, ids[1])]
    assert "cpu, pause = 1.0, digits, 1 seed" in rows[1].setting_text
    assert ids[1] in scoreboard_table(rows).markdown()
    # The counts and the sentence are the profile's alone.
    assert counts(rows)["holds"] == "1"
    assert counts(rows)["undecided"] == ""
    # The same parameters again, written out, are the profile's: newest wins among equals.
    again = _study([2.4, 2.5, 2.6], [0, 1, 2], pause=0.0)
    assert [row.measured for row in collect(["fake"])] == [pytest.approx(2.5), 0.2]
    assert read_results(again.folder)[0].result == ids[0]


def test_a_run_with_other_parameters_is_published_when_asked_for_and_takes_no_ones_place(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake()
    target = tmp_path / "results"
    own = _study([2.0, 2.1, 2.2], [0, 1, 2])
    other = _study([0.2], [0], pause=1.0)
    publish(["fake"], target)
    assert [folder.name for folder in sorted((target / "fake").iterdir()) if folder.is_dir()] == ["cpu"]
    assert read_results(target / "fake" / "cpu")[0].measured == pytest.approx(2.1)
    number = read_results(other.folder)[0].result
    publish([number], target)
    kept = f"cpu-{number}"
    assert sorted(folder.name for folder in (target / "fake").iterdir() if folder.is_dir()) == ["cpu", kept]
    page = (target / "fake" / "README.md").read_text()
    assert "The run differs from today's profile in 1 parameter; it counts for no verdict" in page
    assert "pause" in page.partition("in 1 parameter")[2].partition("</details>")[0]
    assert f"Result: `{number}`" in page
    assert f"{kept}/figures/curve.png" in page
    before = (target / "fake" / "README.md").read_text()
    publish([other.folder, own.folder], target)
    assert (target / "fake" / "README.md").read_text() == before
    assert read_results(target / "fake" / "cpu")[0].measured == pytest.approx(2.1)
    with pytest.raises(LayerlabError, match="no id of a result"):
        publish(["0a0a0a0a"], target)


def test_what_was_a_profiles_result_is_none_once_the_profile_has_other_parameters(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = fake()
    study = _study([2.0, 2.1, 2.2], [0, 1, 2])
    publish([study.folder], tmp_path / "results")
    paper = site / "fake_plugin" / "paper.toml"
    paper.write_text(paper.read_text() + "more = 1\n")
    publish([], tmp_path / "results")
    rows = collect(["fake"])
    assert [(row.verdict, row.changed) for row in rows] == [("holds", {"more": None})]
    assert (counts(rows)["holds"], counts(rows)["not run"]) == ("", "1")
    assert "without more" in (tmp_path / "results" / "fake" / "README.md").read_text()


def test_a_result_has_its_id_on_rows_figures_and_runs(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake()
    study = _study([2.0, 2.1, 2.2], [0, 1, 2])
    row, = read_results(study.folder)
    run = tracking.client().get_run(study.run_id)
    assert run.data.tags["layerlab.result"] == row.result
    assert tracking.find_notebook_run(row.result).info.run_id == study.run_id
    picture = Image.open(study.folder / "figures" / "curve.png")
    assert row.result in picture.info["Description"]
    # The strip below the drawing holds the text, and a second stamp takes its place.
    strip = np.asarray(picture.convert("L"))[-12:]
    assert strip.min() < 200
    again = Image.open(io.BytesIO(stamped((study.folder / "figures" / "curve.png").read_bytes(), "other")))
    assert again.size == picture.size
    assert again.info["Description"] == "other"


def test_a_results_id_changes_with_parameters_data_and_code_and_with_nothing_else(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = fake()
    study = Study("fake", "cpu", output=tmp_path / "a")
    before = study.identity()
    assert Study("fake", "quick", output=tmp_path / "b").identity().id == before.id  # the same values
    assert Study("fake", "cpu", output=tmp_path / "c", pause=2.0).identity().id != before.id
    assert before.model_copy(update={"data": {"/a": "1"}}).id != before.model_copy(update={"data": {"/a": "2"}}).id
    assert before.model_copy(update={"data": {"/a": "1"}}).id == before.model_copy(update={"data": {"/b": "1"}}).id
    source = site / "fake_plugin" / "__init__.py"
    source.write_text(source.read_text() + "\n# a comment\n")
    assert study.identity().id == before.id
    source.write_text(source.read_text() + "\nRULE = 2\n")
    assert study.identity().id != before.id


def test_diff_says_what_differed_and_which_claims_moved(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = fake()
    one = _study([2.0, 2.1, 2.2], [0, 1, 2])
    source = site / "fake_plugin" / "__init__.py"
    source.write_text(source.read_text() + "\nRULE = 2\n")
    other = _study([0.2, 0.3, 0.4], [0, 1, 2], pause=1.0)
    by_folder = diff(str(one.folder), str(other.folder))
    assert [row[:2] for row in by_folder[0].rows] == [["parameter", "pause"], ["code of plugin", "__init__.py"]]
    assert by_folder[0].rows[0][2:] == ["0.0", "1.0"]
    assert "holds" in by_folder[1].text()
    assert "weaker" in by_folder[1].text()
    by_id = diff(read_results(one.folder)[0].result, other.run_id)
    assert [list(row) for row in by_id[0].rows] == [list(row) for row in by_folder[0].rows]
    same = diff(str(one.folder), str(one.folder))
    assert "Nothing that is known of them differs" in same[0].text()
    assert "No claim moved" in same[1].text()
    with pytest.raises(LayerlabError, match="no run 'nothing'"):
        diff(str(one.folder), "nothing")
