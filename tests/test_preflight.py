"""The pre-flight: what a strategy can do with a network is said, and what it cannot is refused, before any training."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import Freezer, Residual, same_weights
from pydantic import PrivateAttr
from torch import Tensor, nn

from layerlab import (
    LayerlabWarning,
    Preflight,
    Refused,
    Run,
    Strategy,
    build_model,
    compare,
    explore,
    fit,
    load_dataset,
)
from layerlab.cli import main as cli
from layerlab.testing.networks import mlp, plain_cnn

EXAMPLE = torch.zeros(2, 1, 8, 8)
OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 32, "measure": False, "progress": False}


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=64, test_limit=32, device="cpu")


class Picky(Strategy):
    """Refuses networks with batch norm, but only when it has trained for a while."""

    name: ClassVar[str] = "picky"

    def on_epoch_end(self, run: Run) -> None:
        if any(isinstance(module, nn.BatchNorm2d) for module in run.model.modules()):
            raise Refused("picky has no rule for batch norm; use a network without.")


class Convolutions(Strategy):
    """Acts on convolutions alone, and says so."""

    name: ClassVar[str] = "convolutions"

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        return Preflight.of(network, names, otherwise="is no convolution", saves={"forward FLOPs": 0.337})


class Messy(Strategy):
    """Draws random numbers, warns, counts and changes weights."""

    name: ClassVar[str] = "messy"
    _count: int = PrivateAttr(0)

    def on_fit_start(self, run: Run) -> None:
        self._count += 1
        random.random()
        np.random.rand()
        torch.rand(1)
        warnings.warn("messy is slow here.", LayerlabWarning, stacklevel=2)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.zero_()

    @property
    def count(self) -> int:
        return self._count


class Failing(Strategy):
    name = "failing"

    def on_after_backward(self, run: Run) -> None:
        raise ZeroDivisionError("in backward")


def test_a_strategy_that_says_nothing_is_tried_and_covers_what_learns():
    network = Residual()
    network.conv1.requires_grad_(False)
    found = Freezer().preflight(network, EXAMPLE)
    assert sorted(found.covered) == ["bn1", "bn2", "classifier", "conv2"]
    assert found.left_out == {"conv1": "frozen before the fit"}
    assert found.notes == ("freezer does not say on which layers it acts; these are all that learn.",)


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_a_preflight_changes_neither_network_nor_strategy_nor_random_states(build):
    network, strategy = build(), Messy()
    before, modes = copy.deepcopy(network), [module.training for module in network.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = strategy.preflight(network, EXAMPLE)
    assert "messy is slow here." in found.notes
    assert strategy.count == 0
    assert same_weights(network, before)
    assert modes == [module.training for module in network.modules()]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_a_rehearsal_gives_what_the_strategy_says_and_raises_what_it_raises():
    assert Messy().rehearse(plain_cnn(), EXAMPLE) == ("messy is slow here.",)
    assert Freezer().rehearse(Residual(), EXAMPLE) == ()
    with pytest.raises(ZeroDivisionError, match="in backward"):
        Failing().rehearse(plain_cnn(), EXAMPLE)


def test_fit_refuses_before_the_first_step_and_hands_the_findings_on(data):
    class Watcher:
        steps = 0

        def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
            # The start tries the loss once without a gradient.
            self.steps += logits.requires_grad
            return nn.functional.cross_entropy(logits, labels)

    watcher = Watcher()
    with pytest.raises(Refused, match="no rule for batch norm"):
        fit(Residual, data, Picky(), loss=watcher, **OPTIONS)
    assert watcher.steps == 0
    result = fit(plain_cnn, data, [Picky(), Convolutions()], **OPTIONS)
    assert list(result.preflights) == ["picky", "convolutions"]
    assert result.preflights["convolutions"].covered == ("0", "3")


class Asking(Strategy):
    """Says how often it is asked, and draws numbers meanwhile."""

    name: ClassVar[str] = "asking"
    asked: ClassVar[list[int]] = []
    every: int = 1

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        torch.rand(3)
        random.random()
        self.asked.append(self.every)
        return Preflight.of(network)


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_each_arm_is_asked_once_for_all_seeds_and_trains_as_alone(data, build):
    Asking.asked.clear()
    arms = {"plain": (), "one": Asking(), "two": Asking(every=2), "same": Asking()}
    both = compare(build, data, arms, seeds=[0, 1, 2], **OPTIONS)
    assert Asking.asked == [1, 2, 1]
    assert all(both.results["two", seed].preflights.keys() == {"asking"} for seed in (0, 1, 2))
    alone = fit(build, data, Asking(), seed=2, **OPTIONS)
    assert Asking.asked == [1, 2, 1, 1]
    assert same_weights(alone.model, both.results["one", 2].model)
    assert same_weights(alone.model, both.results["plain", 2].model)


def test_another_structure_or_another_frozen_layer_is_asked_about_again(data):
    widths = iter([4, 4, 8, 8])
    frozen = iter([False, False, False, True])

    def build() -> nn.Module:
        width = next(widths)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        network[1].requires_grad_(not next(frozen))
        return network

    Asking.asked.clear()
    both = compare(build, data, {"one": Asking()}, seeds=[0, 1, 2, 3], **OPTIONS)
    assert len(Asking.asked) == 3
    assert [both.results["one", seed].preflights["asking"].covered for seed in range(4)] == [("1", "3")] * 3 + [("3",)]


def test_a_comparison_leaves_the_arm_that_refuses_out(data):
    both = compare(Residual, data, {"plain": (), "picky": Picky()}, keep_going=("picky",), **OPTIONS)
    assert both.arms == ["plain"]
    assert both.failures == {"picky": "picky has no rule for batch norm; use a network without."}


@pytest.mark.parametrize(("build", "acts", "rest"), [(plain_cnn, {"0", "3"}, {"7"}), (mlp, set(), {"1", "3"})])
def test_no_layer_is_left_unmentioned(build, acts, rest):
    found = Convolutions().preflight(build(), EXAMPLE)
    assert set(found.covered) == acts
    assert found.left_out == dict.fromkeys(rest, "is no convolution")


def test_a_layer_may_be_named_by_its_parameters_and_by_any_of_its_names():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    network[2] = network[1]
    found = Preflight.of(network, ["2", "3.weight", "3.bias"])
    assert found.covered == ("2", "3.weight", "3.bias")
    assert found.left_out == {}
    assert Preflight.of(network, ["2", "3.weight"]).left_out == {"3": "the method does not act on it"}


def test_it_shows_itself_as_a_table():
    found = Convolutions().preflight(Residual(), EXAMPLE)
    text = found.table.text(80)
    assert "acts on 2 of 5  conv2, conv1" in text
    assert "leaves out 3    classifier, bn2, bn1: is no convolution" in text
    assert "saves at most   of forward FLOPs 33.7 %" in text
    assert "<table>" in found._repr_html_()


def test_explore_shows_one_row_a_strategy(data):
    arms = {"conv": (Convolutions(),), "both": (Convolutions(), Messy()), "picky": (Picky(),)}
    rows = explore.preflight_table(Residual, data, arms).rows
    assert [row[0] for row in rows] == ["conv", "both: convolutions", "both: messy", "picky"]
    assert rows[0] == ("conv", "2 of 5 layers", "is no convolution", "33.7 % of forward FLOPs")
    assert rows[-1][1] == "picky has no rule for batch norm; use a network without."


def test_the_command_shows_it_for_a_network_by_name_and_for_one_in_a_file(fake, tmp_path):
    fake()
    ended = CliRunner().invoke(cli.main, ["preflight", "fake", "lenet", "--size", "28", "--channels", "1"])
    assert ended.exit_code == 0, ended.output
    layers = sum(bool(list(module.parameters(recurse=False))) for module in build_model("lenet").modules())
    assert f"acts on {layers} of {layers}" in ended.output
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net(num_classes):\n"
                    "    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))\n")
    ended = CliRunner().invoke(cli.main, ["preflight", "fake", f"{file}:net", "--size", "4"])
    assert ended.exit_code == 0, ended.output
    assert "acts on 1 of 1" in ended.output
