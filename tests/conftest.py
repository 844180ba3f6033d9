"""Shared pieces: a small network, small data, a strategy that freezes, and where the real data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
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


class Residual(nn.Module):
    """conv–bn, a residual block, dropout and a classifier; declared in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(16, 10)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.classifier(self.drop(x.mean((2, 3))))


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


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
