"""A notebook is done when our record says so, and never because papermill does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from click.testing import CliRunner
from fake_paper import FINISH, OPEN, TRAIN
from helpers import slow

from layerlab import LayerlabError, Study
from layerlab.cli.main import main
from layerlab.contract.claims import ClaimResult
from layerlab.runs import tracking
from layerlab.runs.execution import execute
from layerlab.runs.jobs import paper_job
from layerlab.runs.manifest import Section, Shown, read_manifest
from layerlab.runs.record import read_results


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


def reproduce(strategy: str, **options) -> list[ClaimResult]:
    job = paper_job(strategy, **options)
    execute(job)
    return read_results(Path(job.folder))


def test_a_notebook_runs_and_leaves_claims_tables_and_runs(fake, tmp_path):
    text = nbformat.v4.new_markdown_cell("## Accuracy\n\nBy epoch.")
    fake(OPEN, TRAIN, text, "study.table('rows', run.frame)", FINISH)
    out = tmp_path / "out"
    (result,) = reproduce("fake", output=out)
    assert result.claim == "gain"
    assert result.measured is not None
    assert result.machine
    assert result.versions["torch"]
    assert read_results(out) == [result]
    assert read_manifest(out) == [
        Section(heading="## Accuracy", text="By epoch.", shows=[Shown(kind="table", name="rows")])]
    assert _files(out) == {"answers.json", "fake.ipynb", "claims.json", "identity.json", "manifest.json",
                           "parameters.json", "study.json"}
    client = tracking.client()
    runs = client.search_runs([tracking.experiment_id("fake")])
    (notebook,) = [run for run in runs if run.data.tags.get("kind") == "notebook"]
    children = [run for run in runs if run.data.tags.get(tracking.NOTEBOOK) == notebook.info.run_id]
    assert sorted(run.data.tags["arm"] for run in children) == ["frozen", "plain"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {item.path for item in client.list_artifacts(notebook.info.run_id)} == {
        "answers.json", "claims.json", "fake.ipynb", "identity.json", "manifest.json", "parameters.json", "tables"}
    executed = nbformat.read(out / "fake.ipynb", 4)
    assert executed.cells[-1].outputs


@slow
def test_plain_papermill_runs_the_same_notebook(fake, tmp_path):
    import papermill

    site = fake(OPEN, TRAIN, FINISH)
    papermill.execute_notebook(site / "fake_plugin" / "notebook.ipynb", tmp_path / "out.ipynb", {"epochs": 1},
                               progress_bar=False)
    (folder,) = (tmp_path / "home" / "runs" / "fake").iterdir()
    assert read_results(folder)[0].measured is not None


@pytest.mark.parametrize("ending", ["import sys; sys.exit(0)", pytest.param("pass", marks=slow)])
def test_a_notebook_that_ends_without_its_claims_has_failed(fake, tmp_path, ending):
    fake(OPEN, ending)
    with pytest.raises(LayerlabError, match=r"(ended before its claims were written|SystemExit).*fake.failed.ipynb"):
        reproduce("fake", output=tmp_path / "out")
    assert _files(tmp_path / "out") == {"fake.failed.ipynb", "manifest.json", "parameters.json", "study.json"}
    (run,) = tracking.client().search_runs([tracking.experiment_id("fake")])
    assert run.info.status == "FAILED"


@slow
def test_an_error_in_a_cell_is_reported_with_its_traceback(fake, tmp_path):
    fake(OPEN, "raise ValueError('something broke')", FINISH)
    with pytest.raises(LayerlabError, match=r"failed in cell 4 \(ValueError: something broke\).*fake.failed.ipynb"):
        reproduce("fake", output=tmp_path / "out")
    assert "something broke" in (tmp_path / "out" / "fake.failed.ipynb").read_text()


@slow
def test_a_notebook_that_a_test_runs_fails_at_a_figure_that_cannot_be_read(fake, tmp_path):
    draw = """from layerlab import figures
figure, ((axis,),) = figures.canvas()
axis.plot([1, 2], [0.960, 0.970])
axis.set(xlabel='epoch', ylabel='share')
axis.yaxis.set_major_formatter('{x:.1f}')
study.figure('rounded', figure)"""
    fake(OPEN, draw, FINISH)
    with pytest.raises(LayerlabError, match=r"figure 'rounded' cannot be read: '1.0' stands at \d+ ticks"):
        reproduce("fake", output=tmp_path / "out")


@slow
def test_a_dead_kernel_is_no_success_and_the_next_run_goes_on(fake, tmp_path):
    fake(OPEN, "import os, signal\nif p.pause: os.kill(os.getpid(), signal.SIGKILL)", TRAIN, FINISH)
    with pytest.raises(LayerlabError, match="lost its kernel"):
        reproduce("fake", changed={"pause": 0.001}, output=tmp_path / "out")
    assert "claims.json" not in _files(tmp_path / "out")
    assert "fake.ipynb" not in _files(tmp_path / "out")
    fake(OPEN, TRAIN, FINISH)
    (result,) = reproduce("fake", changed={"pause": 0.001}, output=tmp_path / "out")
    assert result.measured is not None
    # The interrupted notebook run was taken up again, not doubled.
    runs = tracking.client().search_runs([tracking.experiment_id("fake")], "tags.kind = 'notebook'")
    assert [run.info.status for run in runs] == ["FINISHED"]


@slow
def test_bad_input_that_only_the_notebook_sees_leaves_nothing_that_looks_finished(fake, tmp_path):
    fake(OPEN, "from layerlab import load_dataset\nload_dataset('no-such-data')", FINISH)
    with pytest.raises(LayerlabError, match=r"^Unknown dataset 'no-such-data'"):
        reproduce("fake", output=tmp_path / "out")
    assert _files(tmp_path / "out") == {"manifest.json", "parameters.json", "study.json"}
    assert not json.loads((tmp_path / "out" / "study.json").read_text())["finished"]


@slow
def test_a_training_that_diverges_keeps_its_notebook_with_the_traceback_and_is_no_bad_input(fake, tmp_path):
    train = """from layerlab import build_model, fit, load_dataset
data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
network = build_model("mlp", num_classes=10, image_size=8, width=16)
fit(network, data, epochs=3, lr=1e30, batch_size=64, progress=False)"""
    fake(OPEN, train, FINISH)
    ended = CliRunner().invoke(main, ["reproduce", "fake", "--output", str(tmp_path / "out")])
    assert ended.exit_code == 1, ended.output
    kept = (tmp_path / "out" / "fake.failed.ipynb").read_text()
    assert "Diverged: Training diverged" in kept
    assert "loop.py" in kept


@slow
@pytest.mark.parametrize(("error", "status", "kept"), [("LayerlabError", 1, True), ("Refused", 2, False)])
def test_what_goes_wrong_after_a_training_has_begun_is_bad_input_only_if_it_is_refused(
    fake, tmp_path, error, status, kept
):
    fake(OPEN, TRAIN, f"from layerlab import {error}\nraise {error}('No more.')", FINISH)
    ended = CliRunner().invoke(main, ["reproduce", "fake", "--output", str(tmp_path / "out")])
    assert ended.exit_code == status, ended.output
    assert (tmp_path / "out" / "fake.failed.ipynb").exists() == kept


@slow
def test_an_old_result_does_not_survive_a_new_run_that_fails(fake, tmp_path):
    fake(OPEN, TRAIN, FINISH)
    reproduce("fake", changed={"epochs": 1}, output=tmp_path / "out")
    fake(OPEN, "1 / 0", FINISH)
    with pytest.raises(LayerlabError, match="ZeroDivisionError"):
        reproduce("fake", changed={"epochs": 1}, output=tmp_path / "out")
    with pytest.raises(LayerlabError, match="no finished run"):
        read_results(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "fke"}, r"Unknown strategy 'fke'. Did you mean 'fake'\?"),
        ({"profile": "quik"}, r"Unknown profile 'quik'. Did you mean 'quick'\?"),
        ({"changed": {"epoch": 3}}, r"Unknown parameter of the fake notebook 'epoch'. Did you mean 'epochs'\?"),
        ({"output": "/dev/null/out"}, r"output folder /dev/null/out cannot be written.*--output"),
    ],
)
def test_bad_input_before_anything_runs(fake, tmp_path, arguments, message):
    fake(OPEN, FINISH)
    with pytest.raises(LayerlabError, match=message):
        reproduce(**{"strategy": "fake", "output": tmp_path / "out"} | arguments)
    assert not (tmp_path / "out").exists() or not _files(tmp_path / "out")


@contextlib.contextmanager
def in_another_process(folder: Path) -> Iterator[None]:
    """Another process is at work in a folder until the end of the block."""
    script = ("import sys; from pathlib import Path; from layerlab.base.folder_lock import folder_lock\n"
              "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate()


def test_a_study_in_a_folder_where_another_process_works_is_refused(fake, tmp_path, monkeypatch):
    fake(OPEN, FINISH)
    monkeypatch.setattr("layerlab.runs.session.LINGERS", 0.3)
    (tmp_path / "out").mkdir()
    with in_another_process(tmp_path / "out"):
        with pytest.raises(LayerlabError, match="Another run is at work"):
            Study("fake", output=tmp_path / "out")


def test_the_kernel_of_a_killed_run_is_waited_for_and_one_that_stays_is_named(fake, tmp_path, monkeypatch):
    fake(OPEN, FINISH)
    monkeypatch.setattr("layerlab.runs.session.LINGERS", 0.3)
    with subprocess.Popen(["sleep", "60"]) as process:
        record = {"finished": False, "process": [process.pid, psutil.Process(process.pid).create_time()]}
        out = tmp_path / "out"
        out.mkdir()
        (out / "study.json").write_text(json.dumps(record))
        with pytest.raises(LayerlabError, match=f"Process {process.pid} is at work"):
            Study("fake", output=out)
        process.kill()
    Study("fake", output=out)


def test_two_runs_in_one_folder_are_refused(fake, tmp_path):
    fake(OPEN, FINISH)
    out = tmp_path / "out"
    out.mkdir()
    with in_another_process(out):
        with pytest.raises(LayerlabError, match=f"Another run is at work in {out}"):
            reproduce("fake", output=out)
