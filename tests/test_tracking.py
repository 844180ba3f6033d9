"""MLflow holds every run once, with its tags, also after an interruption and under several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Freezer, free_port, serving, slow

from layerlab import LayerlabError, LayerlabWarning, Study, fit, track
from layerlab.contract.claims import ClaimResult
from layerlab.reporting.scoreboard import collect
from layerlab.runs import tracking
from layerlab.runs.record import workbook_folder
from layerlab.runs.tracking.store import claim_metrics
from layerlab.training.loop import Fit

OPTIONS = dict(epochs=3, batch_size=256)


def _runs() -> list:
    number = tracking.experiment_id("test")
    return tracking.client().search_runs([number])


def test_a_fit_is_one_run_with_tags_params_metrics_and_dataset(digits, residual):
    result = fit(residual, digits, Freezer(), seed=4, observers=[track("test", paper="mine")], progress=False,
                 **OPTIONS)
    (run,) = _runs()
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags["paper"] == "mine"
    assert tags["strategy"] == "freezer"
    assert tags["seed"] == "4"
    assert tags["data"] == digits.fingerprint
    assert {"commit", "machine", "versions"} <= tags.keys()
    assert run.data.params["lr"] == "0.05"
    assert run.data.params["freezer/seconds"] == "0.0"
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["digits"]
    for metric in ("train/loss", "test/top1", "time/epoch_seconds", "cost/backward_flops", "freezer/frozen"):
        found = tracking.client().get_metric_history(run.info.run_id, metric)
        assert [(m.step, m.value) for m in found] == [(row["epoch"], row[metric]) for row in result.history]


def test_a_resumed_fit_goes_on_in_the_same_run_and_every_metric_stands_once(digits, residual, tmp_path):
    first = Fit(residual, digits, Freezer(), checkpoint=tmp_path / "c", observers=[track("test")], **OPTIONS)
    first.train_epoch()
    # Killed after the checkpoint was written and before the second epoch was logged.
    first.observers = ()
    first.train_epoch()
    assert [run.info.status for run in _runs()] == ["RUNNING"]
    fit(residual, digits, Freezer(), checkpoint=tmp_path / "c", observers=[track("test")], progress=False, **OPTIONS)
    (run,) = _runs()
    assert run.info.status == "FINISHED"
    found = tracking.client().get_metric_history(run.info.run_id, "train/loss")
    assert Counter(metric.step for metric in found) == {1: 1, 2: 1, 3: 1}


def test_a_fit_that_fails_is_marked_so(digits, residual):
    with pytest.raises(LayerlabError, match="diverged"):
        fit(residual, digits, observers=[track("test")], lr=1e30, progress=False, **OPTIONS)
    assert [run.info.status for run in _runs()] == ["FAILED"]


def test_a_fit_that_fails_keeps_the_epochs_that_it_finished(digits, residual):
    class Breaks(Freezer):
        def on_epoch_start(self, run):
            if run.epoch == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(residual, digits, Breaks(), observers=[track("test")], progress=False, **OPTIONS)
    (run,) = _runs()
    assert run.info.status == "FAILED"
    assert [m.step for m in tracking.client().get_metric_history(run.info.run_id, "train/loss")] == [1, 2]


def test_the_uri_of_the_environment_is_honoured(tmp_path, monkeypatch, digits, residual):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere/db.sqlite")
    fit(residual, digits, observers=[track("test")], progress=False, **OPTIONS)
    assert (tmp_path / "elsewhere" / "db.sqlite").exists()
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_a_database_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    with pytest.raises(LayerlabError, match=r"cannot be tracked at sqlite:////dev/null/mlflow.db.*MLFLOW_TRACKING_URI"):
        tracking.client()


WRITER = """
import os, signal, sys
from layerlab.runs import tracking
from mlflow.entities import Metric
number, runs, steps, kill_at = map(int, sys.argv[1:])
written = 0
for run in range(runs):
    id = tracking.start_run("load", f"{number}-{run}", f"{number}-{run}", {"writer": str(number)})
    for step in range(steps):
        tracking.client().log_batch(id, metrics=[Metric("loss", step + run / 100, 10**12 + step, step)])
        written += 1
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    tracking.client().set_terminated(id, "FINISHED")
"""


def _load(writers: int, runs: int, steps: int) -> None:
    """Many writers on an empty database, every second of them killed in the middle and started again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(number: int, kill_at: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", WRITER, *map(str, (number, runs, steps, kill_at))]
        return subprocess.Popen(words, env=environment)

    first = [start(number, runs * steps // 2 if number % 2 else 0) for number in range(writers)]
    assert [job.wait() for job in first] == [0, -9] * (writers // 2)
    second = [start(number, 0) for number in range(1, writers, 2)]
    assert [job.wait() for job in second] == [0] * (writers // 2)
    found = tracking.client().search_runs([tracking.experiment_id("load")], max_results=1000)
    assert len(found) == writers * runs
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in found:
        history = tracking.client().get_metric_history(run.info.run_id, "loss")
        assert sorted(metric.step for metric in history) == list(range(steps))


SIZES = [pytest.param(4, 3, 40, marks=slow), pytest.param(8, 20, 200, marks=slow)]


@pytest.mark.parametrize(("writers", "runs", "steps"), SIZES)
def test_many_writers_some_of_them_killed_lose_and_double_nothing(tmp_path, writers, runs, steps):
    _load(writers, runs, steps)


@pytest.mark.parametrize(("writers", "runs", "steps"), SIZES)
def test_the_same_holds_for_a_server_with_postgresql(tmp_path, monkeypatch, writers, runs, steps):
    with _server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        _load(writers, runs, steps)


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    """`mlflow server` on a PostgreSQL of its own: its address."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL and psycopg2: apt install postgresql, pip install psycopg2-binary")
    # PostgreSQL refuses to run as root, and another user cannot see into pytest's folders.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    tools, data = binaries[-1].parent, Path(tempfile.mkdtemp(prefix="layerlab-pg-"))
    if user:
        shutil.chown(data, "postgres", "postgres")
    subprocess.run([*user, tools / "initdb", "-D", data, "-U", "mlflow", "-A", "trust"], check=True, cwd="/",
                   capture_output=True)
    database, web = free_port(), free_port()
    options = f"-p {database} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    subprocess.run([*user, tools / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start"], check=True,
                   cwd="/", capture_output=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri",
        f"postgresql+psycopg2://mlflow@127.0.0.1:{database}/postgres", "--artifacts-destination", folder / "artifacts",
        "--host", "127.0.0.1", "--port", str(web), "--workers", "2",
    ]
    try:
        with serving(command, f"http://127.0.0.1:{web}/health"):
            yield f"http://127.0.0.1:{web}"
    finally:
        subprocess.run([*user, tools / "pg_ctl", "-D", data, "-m", "immediate", "stop"], cwd="/", capture_output=True)
        shutil.rmtree(data)


def test_each_of_several_networks_has_its_claim_s_metric():
    def row(claim: str, measured: float, **conditions: str) -> ClaimResult:
        return ClaimResult.model_construct(claim=claim, measured=measured, conditions=conditions)

    assert claim_metrics([
        row("gain", 1.0, dataset="digits", network="mlp"), row("gain", 2.0, dataset="digits", network="lenet"),
        row("cost", 3.0, dataset="digits", network="mlp"), row("size", 4.0),
    ]) == {"claim/gain/digits/mlp": 1.0, "claim/gain/digits/lenet": 2.0, "claim/cost/digits": 3.0, "claim/size": 4.0}


def test_a_run_whose_process_is_gone_does_not_run_for_ever():
    tracking.start_run("test", "b", "b", {})
    script = "import os; from layerlab.runs import tracking; tracking.start_run('test', 'a', 'a', {}); os._exit(1)"
    subprocess.run([sys.executable, "-c", script])
    assert {run.info.run_name: run.info.status for run in _runs()} == {"a": "RUNNING", "b": "RUNNING"}
    # The next process that tracks anything finds this one alive and that one gone.
    subprocess.run([sys.executable, "-c", "from layerlab.runs import tracking; tracking.client()"], check=True)
    assert {run.info.run_name: run.info.status for run in _runs()} == {"a": "KILLED", "b": "RUNNING"}


def test_a_run_s_artifacts_can_be_added_to_without_mlflow():
    run = tracking.start_run("test", "mine", "attempt", {})
    folder = tracking.artifact_folder(run)
    tracking.log_file(run, b"first", "notes/mine.txt")
    script = ("import sys; from layerlab.runs import tracking; "
              f"tracking.log_file('', b'second', 'notes/mine.txt', {folder!r}); print('mlflow' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    (item,) = tracking.client().list_artifacts(run, "notes")
    assert item.path == "notes/mine.txt"
    assert Path(tracking.client().download_artifacts(run, item.path)).read_text() == "second"


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
    assert before == {tag.key for content in logged for tag in content.get("tags", ())} != set()


def test_an_experiment_that_was_deleted_is_named_with_the_remedy_before_any_training(digits, residual):
    number = tracking.experiment_id("test")
    tracking.client().delete_experiment(number)
    message = rf"'test' was deleted in MLflow; bring it back with `.* experiments restore --experiment-id {number}`"
    with pytest.raises(LayerlabError, match=message):
        fit(residual, digits, observers=[track("test")], progress=False, **OPTIONS)
    with pytest.raises(LayerlabError, match="Runs cannot be tracked at"):
        tracking.experiment_id("")


@pytest.mark.parametrize("uri", ["postgresql+nodriver://me:hunter2@localhost/runs", "nosuch://me:hunter2@localhost/runs",
                                 "mysql+mysqldb://me:hunter2@localhost/runs?password=hunter2"])
def test_a_password_is_masked_and_a_missing_driver_is_a_sentence(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(LayerlabError, match=r"tracked at \w.*me:\*\*\*@localhost.*MLFLOW_TRACKING_URI") as caught:
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
