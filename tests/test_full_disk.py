"""A disk that fills while results are published or a database is brought in: a sentence, and nothing is lost."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import small_disk
from test_publish_safely import everything, finished

from layerlab.cli.main import main


def fill(file: Path) -> None:
    """Write until nothing more goes onto the disk."""
    with file.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"0" * 4096):
            pass


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_results_on_a_disk_that_fills_stay_as_they_were(fake, tmp_path):
    fake()
    first, second = finished(tmp_path / "first", [2.0, 4.0]), finished(tmp_path / "second", [3.0, 5.0])
    with small_disk(tmp_path / "results", "2m") as results:
        assert call("publish", first, "--to", results)[0] == 0
        before = everything(results)
        fill(results / "filling")
        status, said = call("publish", second, "--to", results)
        assert status == 2
        assert "Error: No space left on device: " in said
        assert said.endswith("; make room there, and run the same command again.")
        (results / "filling").unlink()
        assert everything(results) == before
        assert call("publish", second, "--to", results)[0] == 0
        assert everything(results) != before


@pytest.mark.parametrize("begun", [False, True])
def test_a_database_is_brought_in_after_the_disk_was_full(fake, tmp_path, monkeypatch, begun):
    fake()
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    finished(tmp_path / "sent", [2.0, 4.0])
    shutil.move(tmp_path / "there" / "mlflow.db", tmp_path / "sent.db")
    with small_disk(tmp_path / "here", "8m") as here:
        monkeypatch.setenv("LAYERLAB_HOME", str(here))
        if begun:
            finished(here / "own", [7.0, 9.0])
        fill(here / "filling")
        status, said = call("import", tmp_path / "sent.db")
        assert status == 1
        assert "left behind: 1 × " in said
        assert "disk is full); make room there, or set MLFLOW_TRACKING_URI" in said
        (here / "filling").unlink()
        status, said = call("import", tmp_path / "sent.db")
        assert status == 0
        assert "1 run brought in" in said
