"""Tracking under any name, address and database: a sentence before any training, and nothing changed by reading."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from layerlab import LayerlabError, LayerlabWarning, Study, fit, track
from layerlab.reporting.scoreboard import collect
from layerlab.runs import tracking
from layerlab.runs.description import DESCRIPTION
from layerlab.runs.record import workbook_folder

OPTIONS = dict(epochs=3, batch_size=256)


def _runs() -> list:
    return tracking.client().search_runs([tracking.experiment_id("test")])


def test_a_relative_address_of_a_database_counts_from_the_current_folder(tmp_path, monkeypatch, digits, residual):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    monkeypatch.chdir(tmp_path)
    fit(residual, digits, observers=[track("test")], progress=False, epochs=1, batch_size=512)
    (run,) = _runs()
    assert (tmp_path / "mine.db").exists()
    assert tracking.artifact_folder(run.info.run_id).startswith(str(tmp_path / "mlartifacts" / "test"))


HARD_NAMES = ["top-1 (%)", "a@b", "a//b", "/home/me/images", "../x", "x" * 300, "x" * 301, "", "层", "a\nb", "a\\b",
              ".", "claim/gain//data/my images/", "a b:c", "test/top1"]


def test_any_name_of_a_metric_a_parameter_or_a_tag_is_made_one_that_mlflow_takes():
    from mlflow.entities import Metric

    run = tracking.start_run("a name/with ../path?", "n", "n", dict.fromkeys(HARD_NAMES, "tag"))
    tracking.log_metrics(run, [Metric(name, index, 1, 0) for index, name in enumerate(HARD_NAMES)])
    tracking.log_params(run, {name: index for index, name in enumerate(HARD_NAMES)})
    found = tracking.client().get_run(run)
    assert sorted(found.data.metrics.values()) == [*range(len(HARD_NAMES))]
    assert sorted(map(int, found.data.params.values())) == [*range(len(HARD_NAMES))]
    assert list(found.data.tags.values()).count("tag") == len(HARD_NAMES)
    # What was right stays as it is.
    assert {"a b:c", "test/top1", "层"} <= found.data.metrics.keys()
    tracking.log_file(run, b"x", "a.txt")
    assert Path(tracking.artifact_folder(run)).is_relative_to(Path(os.environ["LAYERLAB_HOME"]) / "mlartifacts")


def test_what_a_study_s_claims_are_called_stops_nothing_in_the_end(fake):
    fake()
    study = Study("fake")
    study.claim("gain", [1.0], seeds=[0], conditions={"dataset": "/home/me/my images (50%)//", "network": "a@b"})
    study.finish()
    assert tracking.client().get_run(study.run_id).info.status == "FINISHED"


def test_what_cannot_be_tracked_is_found_before_anything_is_trained(fake, digits, residual, monkeypatch):
    """The calls with which a study ends are made when it opens."""
    fake()
    logged = []
    real = tracking.store.client()._client.log_batch
    monkeypatch.setattr(tracking.store.client()._client, "log_batch",
                        lambda run, **content: (logged.append(content), real(run, **content)))
    study = Study("fake")
    before = {tag.key for content in logged for tag in content.get("tags", ())}
    study.claim("gain", [1.0], seeds=[0])
    study.finish()
    # The names and lengths of an answer and of a run's description are such that every store takes them.
    after = {tag.key for content in logged for tag in content.get("tags", ())} - {"answer", DESCRIPTION}
    assert before == after != set()


def test_an_experiment_that_was_deleted_is_named_with_the_remedy_before_any_training(digits, residual):
    number = tracking.experiment_id("test")
    tracking.client().delete_experiment(number)
    message = rf"'test' was deleted in MLflow; bring it back with `.* experiments restore --experiment-id {number}`"
    with pytest.raises(LayerlabError, match=message):
        fit(residual, digits, observers=[track("test")], progress=False, **OPTIONS)
    with pytest.raises(LayerlabError, match="Runs cannot be tracked at"):
        tracking.experiment_id("")


@pytest.mark.parametrize("kind", ["postgresql+nodriver", "nosuch", "mysql+mysqldb"])
def test_a_password_is_masked_and_a_missing_driver_is_a_sentence(monkeypatch, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"{kind}://me:hunter2@127.0.0.1:{server.getsockname()[1]}/runs?password=hunter2"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(LayerlabError, match=r"tracked at \w.*me:\*\*\*@127.*MLFLOW_TRACKING_URI") as caught:
            tracking.client()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_server_s_password_is_in_no_link(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@host:5000/mlflow/")
    assert tracking.run_url("1", "x) <b>") == "https://host:5000/mlflow/#/experiments/1/runs/x%29%20%3Cb%3E"


def _older(file: Path) -> None:
    """A database of MLflow 2.9."""
    import alembic.command
    import mlflow
    import sqlalchemy
    from alembic.config import Config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    Base.metadata.create_all(sqlalchemy.create_engine(f"sqlite:///{file}"))
    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{file}")
    alembic.command.upgrade(config, "acf3f17fdcc7")


def test_reading_changes_no_database_and_writing_keeps_the_one_of_an_older_mlflow(tmp_path, fake):
    fake()
    home = tmp_path / "home"
    assert [row.verdict for row in collect(["fake"])] == ["not run"]
    assert not home.exists()
    home.mkdir()
    _older(home / "mlflow.db")
    before = (home / "mlflow.db").read_bytes()
    assert [row.verdict for row in collect(["fake"])] == ["not run"]
    assert {file.name: file.read_bytes() for file in home.iterdir()} == {"mlflow.db": before}
    with pytest.warns(LayerlabWarning, match=r"older MLflow.*mlflow.db.acf3f17fdcc7 is the database as it was"):
        tracking.client()
    assert (home / "mlflow.db.acf3f17fdcc7").stat().st_size == len(before)


def test_a_parent_folder_s_database_is_layerlab_s_own_or_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("LAYERLAB_HOME")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    (tmp_path / "mlflow.db").touch()
    assert workbook_folder() == below
    (tmp_path / "mlflow.db.lock").touch()
    assert workbook_folder() == tmp_path


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path, monkeypatch):
    home = tmp_path / "killed"
    monkeypatch.setenv("LAYERLAB_HOME", str(home))
    process = subprocess.Popen([sys.executable, "-c", "from layerlab.runs import tracking; tracking.client()"])
    end = time.monotonic() + 60
    while not list(home.glob(".mlflow.db.*new")) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (home / "mlflow.db").exists()
    assert tracking.client().search_experiments()
    assert (home / "mlflow.db").exists()
    assert not list(home.glob(".mlflow.db.*new"))
