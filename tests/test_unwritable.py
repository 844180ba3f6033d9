"""Folders that layerlab writes to by the way and cannot: a sentence, and what was asked for happens all the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import slow, small_disk, write_notebook
from nbformat.v4 import new_code_cell
from PIL import Image
from test_full_disk import call, fill
from test_publish_safely import finished

import layerlab
from layerlab.base.processes import import_path

LOADS = "from layerlab import load_dataset\nprint(len(load_dataset({!r}, image_size=8).train), 'images')"
# A space of mounts in which no folder for temporary files can be written, nor the current one, and the first argument
# can.
ALONE = """
for each in /tmp /var/tmp "$1"; do mount --bind "$each" "$each" || exit 99; done
for each in /tmp /var/tmp; do mount -o remount,ro,bind "$each" || exit 99; done
cd /proc && shift && exec "$@"
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A notebook that loads a folder of images."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return write_notebook(tmp_path / "own" / "loads.ipynb", [new_code_cell(LOADS.format(str(tmp_path / "images")))])


@contextlib.contextmanager
def unusable(place: Path, kind: str) -> Iterator[None]:
    """Make a folder of which nothing can be written to."""
    if kind == "a file":
        place.touch()
        yield
    elif kind == "no right":
        if not os.geteuid():
            pytest.skip("root may write everywhere")
        place.mkdir()
        place.chmod(0o555)
        yield
    else:
        with small_disk(place, "64k"):
            fill(place / "filling")
            yield


@slow
@pytest.mark.parametrize("kind", ["a file", "a full disk", "no right"])
def test_without_a_cache_each_command_does_what_it_does_with_one_and_says_so(
    fake, images, tmp_path, monkeypatch, kind
):
    fake()
    # One plugin, for speed: each import of all seven takes seconds.
    monkeypatch.setattr(layerlab.strategies, "every", lambda: [layerlab.strategies["fake"]])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    run = finished(tmp_path / "sent", [2.0, 4.0])
    # Only now: what is finished is remembered in the cache, which makes its folder.
    monkeypatch.setenv("LAYERLAB_CACHE", str(tmp_path / "unusable"))
    shutil.copy(tmp_path / "home" / "mlflow.db", tmp_path / "there" / "mlflow.db")
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "here"))
    (tmp_path / "plan.yaml").write_text(f"- notebook: {images}\n")
    with unusable(tmp_path / "unusable", kind):
        status, said = call("list")
        assert status == 0
        assert "A paper" in said
        assert "What the plugins' imports showed is not kept, so the next command imports them again: " in said
        assert call("publish", run, "--to", "results")[0] == 0
        status, said = call("import", tmp_path / "there" / "mlflow.db")
        assert "1 run brought in" in said
        for command in (("reproduce", images, "--output", "out"), ("batch", "plan.yaml")):
            status, said = call(*command)
            assert status == 0
            assert "Decoded images are not kept, so the next start decodes again: " in said


@slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs mounts of its own: root's")
def test_without_a_folder_for_temporary_files_each_command_ends_in_a_sentence_or_well(fake, images, tmp_path):
    fake()
    (tmp_path / "there").mkdir()
    run = finished(tmp_path / "sent", [2.0, 4.0])
    shutil.move(tmp_path / "home" / "mlflow.db", tmp_path / "there" / "mlflow.db")
    (tmp_path / "plan.yaml").write_text(f"- notebook: {images}\n")
    results = tmp_path / "results"
    commands: list[tuple[tuple[object, ...], int, str]] = [
        (("list",), 2, "Error: No plugin can be imported: "),
        (("publish", run, "--to", results), 2, "Error: "),
        (("import", tmp_path / "there" / "mlflow.db"), 2, "Error: "),
        (("reproduce", images, "--output", tmp_path / "out"), 1, "Failed: The notebook of "),
        (("batch", tmp_path / "plan.yaml"), 1, "Failed: The notebook of "),
    ]
    environment = {**os.environ, "TMPDIR": str(images), "PYTHONPATH": import_path()}
    for command, status, said in commands:
        words = [sys.executable, "-m", "layerlab.cli", *map(str, command)]
        ended = subprocess.run(["unshare", "-m", "sh", "-c", ALONE, "sh", tmp_path, *words], text=True,
                               capture_output=True, env=environment)
        if ended.returncode == 99:
            pytest.skip("mounts are not allowed here")
        assert ended.returncode == status, (command, ended.stderr)
        assert said in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        assert "No usable temporary directory" in ended.stderr
        assert "; set TMPDIR to a folder that can be written" in ended.stderr
    # Nothing of it stands half done in the way of a second try.
    assert not results.exists()
    for command in (("publish", run, "--to", results), ("import", tmp_path / "there" / "mlflow.db"),
                    ("reproduce", images, "--output", tmp_path / "out")):
        assert call(*command)[0] == 0, command
