"""What authors of plugins asked for: a hook before each step, random numbers of a strategy's own, residual blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from helpers import same_weights
from pydantic import PrivateAttr

from layerlab import Fit, Run, Strategy, fit, forward_order


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
