"""A checkpoint belongs to the fit that wrote it: any other network, loss, optimizer or schedule is refused."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerlab import LayerlabError, fit, load_dataset
from layerlab.training.loop import Fit

SCHEDULES = torch.optim.lr_scheduler


def perceptron(activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0, frozen: bool = False) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), activation(), nn.Dropout(dropout), nn.Linear(16, 10))
    network[1].requires_grad_(not frozen)
    return network


def convolutions(activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0, frozen: bool = False) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), activation(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(8, 10))
    network[0].requires_grad_(not frozen)
    return network


class Scaled(nn.Module):
    """Its factor is an attribute, and it computes with the method that it is made with."""

    def __init__(self, factor: float, bent: bool = False) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(64, 10), factor
        if bent:
            self.forward = lambda x: self.linear(x.flatten(1)).abs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.linear(x.flatten(1))


def rates(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr)


def focal(gamma: float) -> Any:
    return lambda logits, labels: (nn.functional.cross_entropy(logits, labels, reduction="none") ** gamma).mean()


OTHERS = {
    "activation": (lambda build: build(), lambda build: build(nn.Tanh), {}, {}),
    "dropout": (lambda build: build(), lambda build: build(dropout=0.8), {}, {}),
    "frozen layer": (lambda build: build(), lambda build: build(frozen=True), {}, {}),
    "loss": (lambda build: build(), lambda build: build(), {}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.5)}),
    "loss in a lambda": (lambda build: build(), lambda build: build(), {"loss": focal(1.0)}, {"loss": focal(2.0)}),
    "optimizer": (lambda build: build(), lambda build: build(), {"optimizer": rates(0.1)}, {"optimizer": rates(0.01)}),
    "schedule": (
        lambda build: build(), lambda build: build(),
        {"schedule": lambda optimizer: SCHEDULES.LambdaLR(optimizer, lambda epoch: 1.0)},
        {"schedule": lambda optimizer: SCHEDULES.LambdaLR(optimizer, lambda epoch: 0.5)},
    ),
}


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=64, test_limit=32, device="cpu")


def run(build: Any, data: Any, folder: Path, **more: Any) -> Any:
    return fit(build, data, checkpoint=folder, epochs=1, batch_size=32, progress=False, measure=False, **more)


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("build", [perceptron, convolutions])
def test_another_fit_does_not_get_this_ones_result(what, build, data, tmp_path):
    first, second, before, after = OTHERS[what]
    row = run(functools.partial(first, build), data, tmp_path, **before).final
    assert run(functools.partial(first, build), data, tmp_path, **before).final == row
    with pytest.raises(LayerlabError, match="belongs to a fit with other arguments"):
        run(functools.partial(second, build), data, tmp_path, **after)


@pytest.mark.parametrize("other", [lambda: Scaled(2.0), lambda: Scaled(1.0, bent=True)])
def test_attributes_and_code_of_a_users_module_count(other, data, tmp_path):
    run(lambda: Scaled(1.0), data, tmp_path)
    with pytest.raises(LayerlabError, match="belongs to a fit with other arguments"):
        run(other, data, tmp_path)


def fingerprint() -> str:
    """Of a fit with everything that a user may pass."""
    found = load_dataset("digits", limit=64, test_limit=32, device="cpu")
    return Fit(lambda: Scaled(1.0), found, loss=focal(1.0), optimizer=rates(0.1), epochs=1, batch_size=32).fingerprint


def test_another_process_comes_to_the_same_fingerprint():
    script = "import test_fingerprint as t; print(t.fingerprint())"
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True,
                           check=True, env={"PYTHONHASHSEED": "1", **environment}).stdout
    assert found.strip() == importlib.import_module("test_fingerprint").fingerprint() != ""


def test_a_strategys_helper_module_counts_and_its_comments_do_not(data, tmp_path, monkeypatch):
    package = tmp_path / "somebodys"
    package.mkdir()
    (package / "__init__.py").write_text("from layerlab import Strategy\nfrom somebodys.rules import RULE\n"
                                         "class Mine(Strategy):\n    name = 'mine'\n")
    (package / "rules.py").write_text("RULE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("somebodys").Mine
    for name in ("somebodys", "somebodys.rules"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    run(perceptron, data, tmp_path / "kept", strategies=mine())
    (package / "rules.py").write_text("# As the paper has it.\nRULE = 1\n")
    run(perceptron, data, tmp_path / "kept", strategies=mine())
    (package / "rules.py").write_text("RULE = 2\n")
    with pytest.raises(LayerlabError, match="belongs to a fit with other arguments"):
        run(perceptron, data, tmp_path / "kept", strategies=mine())
