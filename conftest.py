"""Fixtures of all tests: folders of their own, a small network, small data, and where the real data lie."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from fake_paper import PAPER, TESTS
from helpers import Residual
from torch import nn

import layerlab
from layerlab import Dataset, load_dataset

# Somebody else's plugins, which have tests of their own and are not installed here.
collect_ignore = ["tests/outside"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the workbook, its tracking database or the user's cache."""
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LAYERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def _imports_shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture
def known_plugins(tmp_path: Path, _imports_shown: Path) -> None:
    """What an import of the plugins has shown is known from test to test, as it is from command to command."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "plugins").symlink_to(_imports_shown)


@pytest.fixture(autouse=True, scope="session")
def _readable_figures() -> Iterator[None]:
    """A notebook that a test runs fails at a figure whose labels overlap, repeat, are cut or lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERLAB_CHECK_FIGURES", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _tables_made_once() -> Iterator[None]:
    """MLflow makes the tables of a database by all of its migrations, in a second; those of a further one in this
    process are a copy of the first one's."""
    from mlflow.store.db import utils

    made, first = utils._initialize_tables, b""

    def initialize(engine: Any) -> None:
        nonlocal first
        file = Path(engine.url.database)
        # What MLflow says of a full disk is its own.
        if first and shutil.disk_usage(file.parent).free > len(first):
            file.write_bytes(first)
        else:
            made(engine)
            first = file.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", initialize)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors too small for threads, which on a busy machine make each step a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", device="cpu")


@pytest.fixture
def residual() -> type[nn.Module]:
    return Residual


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets, or a skip that says what is missing."""
    root = os.environ.get("LAYERLAB_DATA")
    if not root:
        beside = Path(__file__).resolve().parents[1] / "shared" / "data"
        root = str(beside) if beside.is_dir() else ""
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("needs the real datasets: set LAYERLAB_DATA to their folder")
    return Path(root)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install a strategy `fake` whose paper's notebook has the given cells, or cells of the given code, after the
    parameters."""
    site = tmp_path / "site"
    package = site / "fake_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent("""
        from layerlab import Strategy
        class Fake(Strategy):
            name = "fake"
    """))
    info = site / "fake_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[layerlab.strategies]\nfake = fake_plugin:Fake\n")
    (package / "paper.toml").write_text(PAPER)
    monkeypatch.syspath_prepend(str(site))
    # Before what is on the path already: a checkout that is not the installed one, say.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
    layerlab.strategies.refresh()
    monkeypatch.delitem(sys.modules, "fake_plugin", raising=False)

    def cell(given: str | nbformat.NotebookNode) -> nbformat.NotebookNode:
        if isinstance(given, str):
            return nbformat.v4.new_code_cell(given.replace("TESTS", repr(TESTS)))
        return given

    def write(*cells: str | nbformat.NotebookNode) -> Path:
        parameters = nbformat.v4.new_code_cell(
            "profile = 'quick'  # profile\nepochs = None  # epochs\npause = None  # seconds a step",
            metadata={"tags": ["parameters"]})
        book = nbformat.v4.new_notebook(
            cells=[parameters, *map(cell, cells)],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
        nbformat.write(book, package / "notebook.ipynb")
        return site

    yield write
    layerlab.strategies.refresh()


def pytest_collection_finish() -> None:
    """What importing and collecting has left stays: no collection of garbage needs to go through it again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _kept_by_libraries() -> Iterator[None]:
    """Nor through what a module of tests makes libraries keep, such as compiled code."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that count what they leave want it back."""
    gc.unfreeze()
