"""Fixtures of all tests: folders of their own, a small network, small data, and where the real data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import Residual
from torch import nn

from layerlab import Dataset, load_dataset


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the workbook, its tracking database or the user's cache."""
    monkeypatch.setenv("LAYERLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LAYERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


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
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"
        root = str(beside) if beside.is_dir() else ""
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("needs the real datasets: set LAYERLAB_DATA to their folder")
    return Path(root)
