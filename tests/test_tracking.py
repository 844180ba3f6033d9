"""MLflow holds every run once, with its tags, also after an interruption and under several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_paper import FINISH, OPEN, TESTS
from helpers import Freezer, free_port, serving, slow, small_disk

from layerlab import LayerlabError, LayerlabWarning, Study, fit, track
from layerlab.contract.claims import ClaimResult
from layerlab.runs import tracking
from layerlab.runs.record import read_record
from layerlab.runs.tracking.store import claim_metrics
from layerlab.show.progress import say_not_first
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


def _locked(database: Path) -> sqlite3.Connection:
    """Nobody else reads or writes a database until the connection is closed."""
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def _histories(run_id: str) -> dict[str, list[int]]:
    """Steps of each metric of a run, in the order in which they were written."""
    client = tracking.client()
    names = client.get_run(run_id).data.metrics
    return {name: [metric.step for metric in client.get_metric_history(run_id, name)] for name in names}


def test_a_database_that_is_locked_in_the_middle_ends_no_training_and_gets_everything_later_once(
    digits, residual, tmp_path
):
    held = []

    class Locks(Freezer):
        def on_epoch_start(self, run):
            if run.epoch == 2:
                held.append(_locked(tmp_path / "home" / "mlflow.db"))
            super().on_epoch_start(run)

    with pytest.warns(LayerlabWarning, match="does not take freezer .* is locked by process"):
        result = fit(residual, digits, Locks(), observers=[track("test")], progress=False, **OPTIONS)
    assert len(result.history) == 3
    (file,) = tracking.unsent_files()
    content = file.read_bytes()
    held[0].close()
    assert [run.info.status for run in _runs()] == ["RUNNING"]
    assert tracking.send_unsent([file]) == 1
    (run,) = _runs()
    assert run.info.status == "FINISHED"
    assert set(map(tuple, _histories(run.info.run_id).values())) == {(1, 2, 3)}
    # Sent, and killed before the file was removed.
    file.parent.mkdir()
    file.write_bytes(content)
    assert tracking.send_unsent(tracking.unsent_files()) == 1
    assert set(map(tuple, _histories(run.info.run_id).values())) == {(1, 2, 3)}
    assert tracking.unsent_files() == []


def test_a_lock_that_is_given_back_soon_leaves_nothing_to_send(digits, residual, tmp_path, monkeypatch):
    monkeypatch.setattr("layerlab.runs.tracking.outbox.FIRST", 0.0)
    monkeypatch.setattr("layerlab.runs.tracking.tracker.PAUSE", 0.0)
    held = []

    class Twice(Freezer):
        def on_epoch_start(self, run):
            if run.epoch == 2:
                held.append(_locked(tmp_path / "home" / "mlflow.db"))
            if run.epoch == 3:
                assert tracking.unsent_files()
                held[0].close()
            super().on_epoch_start(run)

    with pytest.warns(LayerlabWarning, match="MLflow is there again"):
        fit(residual, digits, Twice(), observers=[track("test")], progress=False, **OPTIONS)
    (run,) = _runs()
    assert run.info.status == "FINISHED"
    assert set(map(tuple, _histories(run.info.run_id).values())) == {(1, 2, 3)}
    assert tracking.unsent_files() == []


@slow
def test_what_a_dead_process_could_not_send_is_sent_by_the_next_study(digits, tmp_path, fake):
    fake(OPEN, FINISH)
    home = tmp_path / "home"
    tracking.client()
    script = f"""
import sys; sys.path.insert(0, {TESTS!r})
import sqlite3, os
from fake_paper import FINISH, OPEN, TESTS
from helpers import Freezer, Residual
from layerlab import fit, load_dataset, track
class Locks(Freezer):
    def on_epoch_start(self, run):
        if run.epoch == 2:
            connection = sqlite3.connect({str(home / "mlflow.db")!r}, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
            globals()["kept"] = connection
        super().on_epoch_start(run)
fit(Residual, load_dataset("digits", device="cpu"), Locks(), observers=[track("test")], progress=False, epochs=3,
    batch_size=256)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(tracking.unsent_files()) == 1
    Study("fake", output=tmp_path / "out")
    (run,) = _runs()
    assert run.info.status == "FINISHED"
    assert set(map(tuple, _histories(run.info.run_id).values())) == {(1, 2, 3)}
    assert tracking.unsent_files() == []


def test_a_study_whose_database_goes_away_is_finished_and_sends_its_claims_later(fake, tmp_path):
    fake(OPEN, FINISH)
    out = tmp_path / "home" / "runs" / "fake" / "quick"
    study = Study("fake", output=out)
    held = _locked(tmp_path / "home" / "mlflow.db")
    with pytest.warns(LayerlabWarning, match="does not take fake · quick"):
        study.finish()
    held.close()
    assert read_record(out)["finished"]
    assert tracking.client().get_run(study.run_id).info.status == "RUNNING"
    assert tracking.send_unsent(tracking.unsent_files()) == 1
    run = tracking.client().get_run(study.run_id)
    assert run.info.status == "FINISHED"
    assert len(tracking.claim_rows(run)) == 1


def test_a_lock_is_waited_for_with_a_word_before_a_run_begins(tmp_path, digits, residual):
    tracking.client()
    script = ("import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
              "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); time.sleep(6)")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "home" / "mlflow.db")], text=True,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.warns(LayerlabWarning, match=f"is locked by process {holder.pid}; waiting for it"):
            fit(residual, digits, observers=[track("test")], progress=False, **OPTIONS)
    assert [run.info.status for run in _runs()] == ["FINISHED"]


@pytest.mark.parametrize(("make", "message"), [
    pytest.param(lambda file: file.mkdir(), "is a folder", marks=slow),
    (lambda file: file.write_bytes(os.urandom(40_000)), "is no database"),
    pytest.param(lambda file: file.write_bytes(b"SQLite format 3\0"), "is cut off|is damaged", marks=slow),
    (lambda file: shutil.copy(_whole_database(file.with_suffix(".whole"), 9000), file), "is cut off"),
])
def test_what_is_no_database_is_one_sentence_at_once(tmp_path, make, message):
    file = tmp_path / "home" / "mlflow.db"
    file.parent.mkdir()
    make(file)
    words = [sys.executable, "-c", "from layerlab.runs import tracking; tracking.client()"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(message, last)
    assert "MLFLOW_TRACKING_URI" in last
    assert "sqlalche" not in done.stderr


def _whole_database(file: Path, size: int) -> Path:
    """A database, cut off after so many bytes."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 50)
        connection.commit()
    file.write_bytes(file.read_bytes()[:size])
    return file


def test_a_server_that_is_away_is_named_at_once(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(LayerlabError, match=r"Nothing answers at 127.0.0.1:\d+.*MLFLOW_TRACKING_URI"):
        tracking.client()


def test_a_process_that_writes_nothing_says_so(digits, residual, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    say_not_first.cache_clear()
    with pytest.warns(LayerlabWarning, match="RANK=1 is set.*unset RANK"):
        fit(residual, digits, observers=[track("test")], checkpoint=tmp_path / "c", progress=False, **OPTIONS)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_fills_in_the_middle_ends_no_training(digits, residual, tmp_path, monkeypatch):
    with small_disk(tmp_path / "full", "8m") as full:
        monkeypatch.setenv("LAYERLAB_HOME", str(full))
        monkeypatch.setenv("LAYERLAB_PROGRESS", str(full / "progress.jsonl"))
        monkeypatch.setattr("layerlab.runs.tracking.outbox.FIRST", 0.0)
        monkeypatch.setattr("layerlab.runs.tracking.tracker.PAUSE", 0.0)
        filler = full / "filler"

        class Fills(Freezer):
            def on_epoch_start(self, run):
                if run.epoch == 2:
                    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
                        while True:
                            stream.write(bytes(4096))
                if run.epoch == 3:
                    filler.unlink()
                super().on_epoch_start(run)

        result = fit(residual, digits, Fills(), observers=[track("test")], progress=True, **OPTIONS)
        assert len(result.history) == 3
        (run,) = _runs()
        assert run.info.status == "FINISHED"
        assert set(map(tuple, _histories(run.info.run_id).values())) == {(1, 2, 3)}
        assert tracking.unsent_files() == []
