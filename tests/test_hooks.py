"""What authors of plugins asked for: a hook before each step, random numbers of a strategy's own, residual blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from helpers import same_weights
from pydantic import PrivateAttr
from torch import nn

from layerlab import Fit, Refused, ResidualBlock, Run, Strategy, build_model, fit, forward_order, residual_blocks


class Draws(Strategy):
    """Freezes in each step as many layers as its own random numbers say."""

    name: ClassVar[str] = "draws"
    stream: str = "draws"
    _order: list[Any] = PrivateAttr(default_factory=list)
    _drawn: list[int] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        self._order = [module for _, module in forward_order(run.model, run.example)]
        self._drawn = []

    def on_train_batch_start(self, run: Run) -> None:
        drawn = int(torch.randint(len(self._order), (), generator=run.generator_for(self.stream)))
        run.freeze(self.name, self._order[:drawn])
        self._drawn.append(drawn)

    @property
    def drawn(self) -> list[int]:
        return self._drawn


class Idle(Draws):
    """Draws as much and does nothing."""

    name: ClassVar[str] = "idle"

    def on_train_batch_start(self, run: Run) -> None:
        torch.rand(100, generator=run.generator_for(self.stream))


OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 256, "progress": False}


def test_a_hook_before_each_step_decides_what_the_step_trains(digits, residual):
    strategy = Draws()
    result = fit(residual, digits, strategy, **OPTIONS)
    steps = 3 * (len(digits.train) // 256)
    drawn = result.strategies[0].drawn
    assert len(drawn) == steps
    assert len(set(drawn)) > 2
    assert not same_weights(result.model, fit(residual, digits, **OPTIONS).model)


def test_a_strategy_s_own_random_numbers_disturb_nothing_else(digits, residual):
    plain, idle = (fit(residual, digits, strategies, **OPTIONS) for strategies in ((), Idle()))
    assert same_weights(plain.model, idle.model)


def test_own_random_numbers_follow_from_seed_and_name_alone(digits, residual):
    def drawn(strategies: list[Strategy], seed: int) -> list[int]:
        result = fit(residual, digits, strategies, seed=seed, **OPTIONS)
        return next(each.drawn for each in result.strategies if isinstance(each, Draws) and each.name == "draws")

    one = drawn([Draws()], 0)
    assert drawn([Idle(stream="other"), Draws()], 0) == one
    assert drawn([Draws()], 1) != one
    assert drawn([Draws(stream="another")], 0) != one


def test_own_random_numbers_go_on_after_an_interruption(digits, residual, tmp_path):
    whole = fit(residual, digits, Draws(), **OPTIONS)
    settings = {name: value for name, value in OPTIONS.items() if name != "progress"}
    for stop in (1, 2):
        folder = tmp_path / str(stop)
        training = Fit(residual, digits, Draws(), checkpoint=folder, **settings)
        for _ in range(stop):
            training.train_epoch()
        again = fit(residual, digits, Draws(), checkpoint=folder, **OPTIONS)
        assert same_weights(whole.model, again.model)


def names(block: ResidualBlock) -> tuple[str, list[str], list[str]]:
    return block.name, list(block.branch), list(block.shortcut)


@pytest.mark.parametrize(("network", "count", "place", "wanted"), [
    ("resnet18", 8, 0, ("layer1.0", ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu", "layer1.0.conv2",
                                     "layer1.0.bn2"], [])),
    ("resnet18", 8, 2, ("layer2.0", ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.relu", "layer2.0.conv2",
                                     "layer2.0.bn2"], ["layer2.0.downsample.0", "layer2.0.downsample.1"])),
    ("preact-resnet", 54, 0, ("stage1.0", [f"stage1.0.{kind}{i}" for i in (1, 2, 3) for kind in ("bn", "relu", "conv")],
                              ["stage1.0.downsample"])),
    ("swin_t", 24, 0, ("features.1.0", ["features.1.0.norm1", "features.1.0.attn", "features.1.0.attn.qkv",
                                        "features.1.0.attn.proj"], [])),
    ("convnext_tiny", 18, 0, ("features.1.0", ["features.1.0", *(f"features.1.0.block.{i}" for i in (0, 2, 3, 4, 5))],
                              [])),
    ("mobilenet_v2", 10, 9, None), ("vit_b_16", 24, 0, None), ("efficientnet_b0", 9, 0, None), ("vgg11", 0, 0, None),
    ("densenet121", 0, 0, None), ("lenet", 0, 0, None),
])
def test_residual_blocks_are_found_in_networks_of_all_makes(network, count, place, wanted):
    blocks = residual_blocks(build_model(network, num_classes=10))
    assert len(blocks) == count
    if wanted is not None:
        assert names(blocks[place]) == wanted


def test_residual_blocks_within_another_and_sums_that_are_none(residual):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.shift
            y = self.outer(x)
            y += self.inner(y)
            return self.last(torch.add(torch.relu(x), y) + x.mean())

    assert [names(block) for block in residual_blocks(Nested())] == [
        ("", ["inner"], []), ("", ["outer", "inner"], []), ("", ["outer", "inner"], [])]
    assert [names(block) for block in residual_blocks(residual())] == [("", ["conv2", "bn2"], [])]


def test_a_network_that_cannot_be_traced_gets_one_sentence():
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + x if x.sum() > 0 else x

    with pytest.raises(Refused, match=r"The residual blocks of Depends cannot be found.*let its forward not depend"):
        residual_blocks(Depends())


def test_a_strategy_may_let_branches_rest_and_the_rest_learns(digits, residual):
    class Drops(Strategy):
        name: ClassVar[str] = "drops"

        def on_epoch_start(self, run: Run) -> None:
            (block,) = residual_blocks(run.model)
            run.freeze(self.name, block.branch.values())

    trained = fit(residual, digits, Drops(), **OPTIONS).model
    torch.manual_seed(0)
    before = residual()
    assert torch.equal(trained.conv2.weight, before.conv2.weight)
    assert not torch.equal(trained.conv1.weight, before.conv1.weight)
