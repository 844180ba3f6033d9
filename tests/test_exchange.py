"""Runs made elsewhere come home once, however often they are brought, and stand on the scoreboard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import Freezer

from layerlab import LayerlabError, Study, fit, track
from layerlab.base.provenance import machine_name
from layerlab.cli.main import main
from layerlab.reporting.scoreboard import collect
from layerlab.runs import tracking
from layerlab.runs.tracking.import_runs import import_file
from layerlab.runs.tracking.imported import Imported
from layerlab.training.loop import Fit


@pytest.fixture
def elsewhere(fake, tmp_path, monkeypatch, digits, residual) -> Path:
    """A workbook on another machine with a finished study, a finished fit and one that was going on."""
    fake()
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "there"))
    study = Study("fake")
    study.claim("gain", [2.0, 4.0], seeds=[0, 1], conditions={"dataset": "digits", "network": "vgg-f"})
    study.finish()
    options = dict(epochs=3, batch_size=512)
    fit(residual, digits, Freezer(), observers=[tracking.Tracker("fake", {"note": "kept"}, study.run_id)],
        progress=False, **options)
    going = Fit(residual, digits, checkpoint=tmp_path / "c", observers=[track("fake")], **options)
    going.train_epoch()
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "home"))
    return tmp_path / "there"


def _runs() -> dict[str, object]:
    found = tracking.client().search_runs([tracking.experiment_id("fake")])
    return {run.data.tags["mlflow.runName"]: run for run in found}


def _counts(found: Imported) -> tuple[int, int]:
    return found.new, found.known


def test_a_copied_database_comes_home_once(elsewhere, tmp_path, monkeypatch):
    copy = tmp_path / "copied.db"
    shutil.copy(elsewhere / "mlflow.db", copy)
    assert _counts(import_file(copy)) == (3, 0)
    assert _counts(import_file(copy)) == (0, 3)
    runs = _runs()
    assert len(runs) == 3
    frozen = runs["freezer · digits · seed 0"]
    assert frozen.info.status == "FINISHED"
    assert frozen.data.tags["note"] == "kept"
    assert frozen.data.params["lr"] == "0.05"
    assert frozen.data.tags[tracking.NOTEBOOK] == runs["fake · quick · notebook"].info.run_id
    assert [d.dataset.name for d in frozen.inputs.dataset_inputs] == ["digits"]
    history = tracking.client().get_metric_history(frozen.info.run_id, "test/top1")
    assert [metric.step for metric in history] == [1, 2, 3]
    # What was going on when the database was copied does not run for ever here.
    assert runs["baseline · digits · seed 0"].info.status == "KILLED"
    assert [row.measured for row in collect(["fake"])] == [3.0]


def test_a_run_that_got_further_is_completed_and_not_doubled(elsewhere, tmp_path, monkeypatch, digits, residual):
    import_file(elsewhere / "mlflow.db")
    monkeypatch.setenv("LAYERLAB_HOME", str(elsewhere))
    fit(residual, digits, checkpoint=tmp_path / "c", observers=[track("fake")], progress=False, epochs=3,
        batch_size=512)
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "home"))
    assert _counts(import_file(elsewhere / "mlflow.db")) == (1, 2)
    runs = _runs()
    assert len(runs) == 3
    run = runs["baseline · digits · seed 0"]
    assert run.info.status == "FINISHED"
    history = tracking.client().get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_claims_come_home_without_a_database_and_know_the_database_that_follows(elsewhere):
    (file,) = elsewhere.glob("runs/fake/quick/claims.json")
    # Written in the very millisecond in which the run ended.
    with contextlib.closing(sqlite3.connect(elsewhere / "mlflow.db")) as database:
        (end,) = database.execute("SELECT end_time FROM runs WHERE name LIKE '%notebook'").fetchone()
    os.utime(file, ns=(end * 1_000_000 + 500_000, end * 1_000_000 + 500_000))
    assert _counts(import_file(file)) == (1, 0)
    assert _counts(import_file(file)) == (0, 1)
    (row,) = collect(["fake"])
    assert (row.measured, row.seeds, row.verdict) == (3.0, [0, 1], "undecided")
    # A verdict is what the values give today, whatever was written down.
    assert "interval includes no effect" in row.reason
    # Its notebook's run is the one that is here, which gets what claims alone do not hold.
    assert _counts(import_file(elsewhere / "mlflow.db")) == (3, 0)
    assert _counts(import_file(elsewhere / "mlflow.db")) == (0, 3)
    assert len(_runs()) == 3


def test_the_scoreboard_shows_it_in_every_form(elsewhere, tmp_path):
    import_file(elsewhere / "mlflow.db")
    call = CliRunner(env={"COLUMNS": "200"}).invoke
    for form in ("text", "markdown", "html", "csv", "latex", "json"):
        result = call(main, ["scoreboard", "fake", "--format", form])
        assert result.exit_code == 0, result.output
        parts = ["a gain", "3 ± 1", "2 seeds", "undecided", "quick"]
        if form in ("text", "markdown", "html"):
            parts += [machine_name().split(",")[0], "http://127.0.0.1:5000/#/experiments/"]
        for part in parts:
            assert part in " ".join(result.output.split()), (form, part)
    page = tmp_path / "page.html"
    assert call(main, ["scoreboard", "fake", "--format", "html", "--output", str(page)]).exit_code == 0
    assert "</html>" in page.read_text()


def test_a_claim_that_nobody_measured_is_listed_as_not_run(fake):
    fake()
    assert [(row.claim, row.verdict) for row in collect(["fake"])] == [("gain", "not run")]


def test_what_is_neither_a_database_nor_claims(tmp_path):
    with pytest.raises(LayerlabError, match=r"no file .*mlflow.db"):
        import_file(tmp_path / "none.db")
    for content in ("no json", json.dumps({"a": 1}), json.dumps([{"paper": "x"}])):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(LayerlabError, match="neither a tracking database nor a claims"):
            import_file(tmp_path / "x.json")
    (tmp_path / "cut.db").write_bytes(b"SQLite format 3\0" + bytes(200))
    with pytest.raises(LayerlabError, match="cannot be read as a tracking database"):
        import_file(tmp_path / "cut.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "bookmarks.db")) as database:
        database.execute("CREATE TABLE bookmarks (address TEXT)")
    with pytest.raises(LayerlabError, match="no tracking database of MLflow"):
        import_file(tmp_path / "bookmarks.db")
