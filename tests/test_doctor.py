"""`layerlab doctor`: one page that shows what went wrong, and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

from click.testing import CliRunner
from helpers import free_port, small_disk

from layerlab.base.cache import cache_folder
from layerlab.cli.main import main
from layerlab.reporting.doctor import health
from layerlab.runs import tracking


def page() -> dict[str, list[str]]:
    """Name of a row → its findings."""
    found: dict[str, list[str]] = {}
    last = ""
    for name, text in health().rows:
        last = name.text or last
        found.setdefault(last, []).append(text.text)
    return found


def test_the_page_fits_a_report_and_leaves_no_trace(tmp_path):
    shown = CliRunner(env={"COLUMNS": "100"}).invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    for word in ("versions", "torch", "memory", "room", "file locks", "leftovers", "tracking", "telemetry", "ports"):
        assert word in shown.output
    assert "cannot be found out" not in shown.output
    assert len(shown.output.splitlines()) < 100
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "cache").exists()


def test_who_holds_a_lock_is_named_with_its_command(tmp_path):
    folder = tmp_path / "home" / "runs" / "mine" / "quick"
    folder.mkdir(parents=True)
    script = ("import sys; from pathlib import Path; from layerlab.base.folder_lock import folder_lock\n"
              "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        (found,) = page()["at work"]
        holder.stdin.close()
    assert found.startswith(f"runs/mine/quick/.layerlab.lock is held by process {holder.pid} (")
    assert sys.executable in found
    assert page()["at work"] == ["nobody holds a lock in the workbook"]


def test_leftovers_are_listed_and_what_is_at_work_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert page()["leftovers"] == ["none"]
    runs = tmp_path / "home" / "runs"
    for file in (runs / "mine/quick/mine.partial.ipynb", runs / "unsent/abc.jsonl",
                 tmp_path / "layerlab-dead/progress.jsonl", tmp_path / "layerlab-live/progress.jsonl",
                 cache_folder() / "code/abc.partial"):
        file.parent.mkdir(parents=True)
        file.touch()
    environment = {**os.environ, "LAYERLAB_PROGRESS": str(tmp_path / "layerlab-live/progress.jsonl")}
    with subprocess.Popen(["sleep", "60"], env=environment) as process:
        found = " ".join(page()["leftovers"])
        process.kill()
    for name in ("mine.partial.ipynb", "abc.jsonl", "layerlab-dead", "code/abc.partial"):
        assert name in found
    assert "layerlab-live" not in found


def test_tracking_says_what_is_wrong_with_it_and_keeps_the_password(tmp_path, monkeypatch):
    assert "the first run makes it" in page()["tracking"][0]
    tracking.start_run("test", "a", "a", {})
    assert "1 runs, 1 of them open" in page()["tracking"][0]
    (tmp_path / "bad.db").write_bytes(b"x" * 5000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/bad.db")
    assert "is no database" in page()["tracking"][0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:secret@127.0.0.1:{free_port()}/runs")
    (found,) = page()["tracking"]
    assert "Nothing answers" in found
    assert "secret" not in found


def test_little_room_and_a_folder_that_cannot_be_written_are_marked(tmp_path, monkeypatch):
    with small_disk(tmp_path / "full", "64k") as full:
        monkeypatch.setenv("LAYERLAB_HOME", str(full))
        (row,) = [row for row in health().rows if row[1].text.startswith("workbook: ")]
        assert row[1].tone == "warning"
