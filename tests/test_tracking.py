"""MLflow holds every run once, with its tags, also after an interruption and under several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import Freezer

from layerlab import LayerlabError, fit, track, tracking
from layerlab.training import Fit

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


def test_processes_that_meet_an_empty_database_at_once_lose_nothing(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from helpers import Residual; from layerlab import *;"
        "fit(Residual, load_dataset('digits', device='cpu'), seed=int(sys.argv[2]), epochs=2, batch_size=512,"
        "observers=[track('test')], progress=False)"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", script, here, str(seed)], env=environment) for seed in range(4)]
    assert [job.wait() for job in jobs] == [0] * 4
    runs = _runs()
    assert sorted(run.data.tags["seed"] for run in runs) == ["0", "1", "2", "3"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert len(tracking.client().get_metric_history(run.info.run_id, "test/top1")) == 2


def test_the_uri_of_the_environment_is_honoured(tmp_path, monkeypatch, digits, residual):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere/db.sqlite")
    fit(residual, digits, observers=[track("test")], progress=False, **OPTIONS)
    assert (tmp_path / "elsewhere" / "db.sqlite").exists()
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_a_database_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    with pytest.raises(LayerlabError, match=r"cannot be tracked at sqlite:////dev/null/mlflow.db.*MLFLOW_TRACKING_URI"):
        tracking.client()
