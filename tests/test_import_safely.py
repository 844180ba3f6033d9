"""A tracking database that somebody sent: it reads and writes nothing elsewhere, and what is left behind is said."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerlab import LayerlabError
from layerlab.cli.main import main
from layerlab.runs import tracking
from layerlab.runs.tracking.import_database import artifact_place
from layerlab.runs.tracking.import_runs import import_file
from layerlab.runs.tracking.schema import sqlite_uri


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """The folder of a workbook that was made elsewhere, with what makes it hard: its own name, an experiment's name, an
    artifact in a folder, a run of MLflow's own nesting."""
    home = tmp_path / "from #1 and who? 100 %"
    monkeypatch.setenv("LAYERLAB_HOME", str(home))
    parent = _run("two words", "parent", {"kind": "notebook"})
    _run("two words", "child", {"mlflow.parentRunId": parent})
    tracking.log_file(parent, b"1,2", "tables/a b#1.csv", tracking.artifact_folder(parent))
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "home"))
    return home


def _run(experiment: str, name: str, tags: Mapping[str, str]) -> str:
    run = tracking.start_run(experiment, name, name, tags)
    tracking.client().set_terminated(run, "FINISHED")
    return run


def _runs(experiment: str) -> dict[str, object]:
    found = tracking.client().search_runs([tracking.experiment_id(experiment)])
    return {run.info.run_name: run for run in found}


def _change(home: Path, *commands: str) -> None:
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database:
        for command in commands:
            database.execute(command)
        database.commit()


def _files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*")} if folder.exists() else set()


def test_a_database_comes_home_from_a_folder_of_any_name_with_artifacts_and_nesting(there, tmp_path):
    before = _files(tmp_path)
    assert {"mlflow.db", "mlflow.db.lock"} <= _files(there)
    found = import_file(there / "mlflow.db")
    assert (found.new, found.known, found.files, found.nested) == (2, 0, 1, 1)
    assert not +found.lost
    runs = _runs("two words")
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    folder = Path(tracking.artifact_folder(runs["parent"].info.run_id))
    assert _files(folder) == {"tables", "tables/a b#1.csv"}
    # Nothing lies where it does not belong.
    assert {file for file in _files(tmp_path) - before if not file.startswith("home")} == set()
    assert (import_file(there / "mlflow.db").new, import_file(there / "mlflow.db").known) == (0, 2)


def test_artifacts_come_home_from_a_copy_and_are_missed_where_they_were_not_copied(there, tmp_path):
    copy = tmp_path / "copy"
    there.rename(copy)
    assert import_file(copy / "mlflow.db").files == 1
    (copy / "mlartifacts").rename(tmp_path / "left")
    os.environ["LAYERLAB_HOME"] = str(tmp_path / "again")
    found = import_file(copy / "mlflow.db")
    assert dict(+found.lost) == {"artifacts of runs, whose folder mlartifacts is not beside the database": 1}


def test_nothing_outside_the_database_s_folder_is_read(there, tmp_path):
    secret = tmp_path / "victim" / ".ssh"
    secret.mkdir(parents=True)
    (secret / "id_rsa").write_text("PRIVATE KEY")
    (there / "inside").mkdir()
    (there / "inside" / "id_rsa").write_text("PRIVATE KEY")
    (run,) = (Path(file).parent.parent.name for file in there.rglob("artifacts"))
    (secret.parent / run).mkdir()
    (secret.parent / run / "artifacts").symlink_to(secret)
    (there / run).mkdir()
    (there / run / "artifacts").symlink_to(secret)
    for uri in (
        secret.as_uri(), str(secret), "file:///x/../victim/.ssh", f"file://{there}/../victim/.ssh",
        (secret.parent / run / "artifacts").as_uri(), f"../victim/{run}/artifacts", "../victim/.ssh",
        f"{there}/{run}/artifacts", (there / "inside").as_uri(), "s3://bucket/x", "", "file://",
    ):
        assert artifact_place(uri, run, there)[0] is None, uri
    _change(there, f"UPDATE runs SET artifact_uri = '{secret.as_uri()}'")
    result = CliRunner().invoke(main, ["import", str(there / "mlflow.db")])
    assert (result.exit_code, "2 runs brought in, with 0 artifacts" in result.output) == (1, True), result.output
    assert "left behind: 2 × artifacts of runs, which" in result.output, result.output
    assert not list((tmp_path / "home").rglob("id_rsa"))


def test_links_among_artifacts_are_left_behind(there, tmp_path):
    (folder,) = there.rglob("artifacts")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("PRIVATE KEY")
    (folder / "key").symlink_to(tmp_path / "secret" / "key")
    (folder / "folder").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    found = import_file(there / "mlflow.db")
    assert found.files == 1
    assert dict(+found.lost) == {"links among artifacts, which layerlab does not follow": 4}


def test_an_experiment_s_name_is_no_path(there, tmp_path):
    names = ["../../../escaped", "/tmp/escaped", "..", "a/../../b", "\x1b[31mred", ""]
    os.environ["LAYERLAB_HOME"] = str(tmp_path / "deep" / "er" / "home")
    for name in names:
        _change(there, f"UPDATE experiments SET name = '{name}' WHERE experiment_id = 1")
        before = _files(tmp_path)
        result = CliRunner().invoke(main, ["import", str(there / "mlflow.db")])
        assert result.exit_code == (0 if name else 1), result.output
        new = _files(tmp_path) - before
        assert all(file.startswith("deep/er/home") or file in ("deep", "deep/er") for file in new), new
        assert "\x1b" not in result.output


def test_what_is_left_behind_is_counted_with_its_reason(there, tmp_path):
    deleted = "UPDATE runs SET lifecycle_stage = 'deleted' WHERE name = 'parent'"
    _change(there, deleted, "INSERT INTO registered_models (name) VALUES ('a')")
    result = CliRunner().invoke(main, ["import", str(there / "mlflow.db")])
    assert result.exit_code == 1
    for part in ("1 run brought in", "1 × parents of runs, which this database does not hold", "1 × deleted runs",
                 "1 × registered models, which layerlab does not keep"):
        assert part in result.output


def test_a_run_that_cannot_be_brought_in_is_said_and_the_others_are(there, tmp_path, monkeypatch):
    real = tracking.store.log_params

    def refuses(run: str, params: object) -> None:
        if tracking.client().get_run(run).info.run_name == "parent":
            raise LayerlabError("no room.")
        real(run, params)

    monkeypatch.setattr("layerlab.runs.tracking.store.log_params", refuses)
    found = import_file(there / "mlflow.db")
    assert found.new == 1
    assert found.lost["runs: no room."] == 1
    assert set(_runs("two words")) == {"child"}


def test_names_that_mlflow_refuses_come_home_under_others(there):
    _change(there, "INSERT INTO params (key, value, run_uuid) SELECT 'share (%)@//x', '3', run_uuid FROM runs",
            "INSERT INTO tags (key, value, run_uuid) SELECT '../x', '4', run_uuid FROM runs")
    assert not +import_file(there / "mlflow.db").lost
    run = _runs("two words")["child"]
    assert list(run.data.params.values()) == ["3"]
    assert "4" in run.data.tags.values()


def test_a_newer_mlflow_s_database_gets_the_right_remedy(there):
    _change(there, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = (there / "mlflow.db").read_bytes()
    with pytest.raises(LayerlabError, match=r"written by a newer MLflow.*pip install -U mlflow"):
        import_file(there / "mlflow.db")
    assert (there / "mlflow.db").read_bytes() == before
    there.rename(there.with_name("newer"))
    os.environ["LAYERLAB_HOME"] = str(there.with_name("newer"))
    for use in (tracking.client, lambda: tracking.notebook_runs("x")):
        with pytest.raises(LayerlabError, match="written by a newer MLflow"):
            use()


def test_a_database_s_address_leads_to_its_file_whatever_its_folder_is_called(tmp_path):
    from sqlalchemy.engine import make_url

    for name in ("plain", "two words", "#1", "who?", "100 %", "%41", "ä", "a?b=c&d#e"):
        assert make_url(sqlite_uri(tmp_path / name / "mlflow.db")).database == str(tmp_path / name / "mlflow.db")
