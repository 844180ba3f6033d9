"""A third party's plugin as mypy sees it: everything public is typed, and what is wrong is found."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from helpers import slow

import layerlab

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = '''\
from typing import ClassVar

from pydantic import Field
from torch import nn

from layerlab import Comparison, Dataset, Estimate, FitResult, Run, Strategy, compare, fit, load_dataset, strategies


class Mine(Strategy):
    """Half of something."""

    name: ClassVar[str] = "mine"
    share: float = Field(0.5, ge=0, lt=1)
    """Of something."""

    def on_fit_start(self, run: Run) -> None:
        run.log("mine/share", self.share)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


data: Dataset = load_dataset("digits", device="cpu")
one: FitResult = fit(network, data, Mine(share=0.2), seed=0, epochs=1)
several: list[FitResult] = fit(network, data, seed=[0, 1], schedule="cosine")
both: Comparison = compare(network, data, {"plain": (), "mine": Mine(), "skip": strategies("lars-skip")}, seeds=[0, 1])
gain: Estimate = both.paired("top-1", "mine", "plain")
'''

# Line → what mypy has to say of it.
WRONG = {
    "fit(mine.network, mine.data, epochs='many')": 'No overload variant of "fit" matches',
    "fit(mine.network, mine.data, epoch=3)": 'No overload variant of "fit" matches',
    "compare(mine.network, mine.data, {'plain': 1})": "incompatible type",
    "reveal_type(fit(mine.network, mine.data, seed=[1]))": '"list[layerlab.training.results.FitResult]"',
    "reveal_type(fit(mine.network, mine.data))": '"layerlab.training.results.FitResult"',
}


@slow
def test_a_third_party_s_plugin_is_checked_strictly_and_its_mistakes_are_found(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "wrong.py").write_text("\n".join(["import mine; from layerlab import compare, fit", *WRONG]) + "\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\nplugins = pydantic.mypy\nfollow_imports = silent\n")
    # mypy does not follow the hook by which an editable installation is found; its cache makes the second run quick.
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache" / "outside")]
    done = subprocess.run([*command, "mine.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "MYPYPATH": str(ROOT)}, check=False)
    said = done.stdout.splitlines()
    assert not [line for line in said if line.startswith("mine.py")], done.stdout
    for number, (line, message) in enumerate(WRONG.items(), 2):
        assert any(each.startswith(f"wrong.py:{number}:") and message in each for each in said), (line, done.stdout)


def test_the_marker_of_typed_packages_is_shipped():
    assert (Path(layerlab.__file__).parent / "py.typed").exists()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["layerlab"]
