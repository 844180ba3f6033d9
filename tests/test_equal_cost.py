"""Plain training of the same cost, and placebos: what stands beside an arm to judge it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from helpers import Residual, same_weights
from torch import nn

from layerlab import (
    Comparison,
    Estimate,
    FitResult,
    LayerlabError,
    Pays,
    Strategy,
    compare,
    evaluate,
    explore,
    figures,
    fit,
)
from layerlab.training.settings import Settings

# 5 steps an epoch.
OPTIONS: dict[str, Any] = dict(epochs=4, batch_size=256, lr=0.05, schedule="cosine", progress=False)


class Resting(Strategy):
    """Freezes all but the last layer from an epoch on; its placebo freezes them as long, at the begin."""

    name: ClassVar[str] = "resting"
    first: int = 3
    last: int = 100

    def on_epoch_start(self, run) -> None:
        rests = self.first <= run.epoch <= self.last
        run.freeze(self.name, [run.model.conv1, run.model.bn1, run.model.conv2, run.model.bn2] if rests else ())
        run.log("resting/rests", rests)

    def placebo(self, result: FitResult) -> Strategy | None:
        rested = sum(row["resting/rests"] for row in result.history)
        return Resting(first=1, last=rested) if rested else None


class Stops:
    """An observer that presses Ctrl-C when an arm has finished an epoch."""

    def __init__(self, arm: str, seed: int, epoch: int) -> None:
        self.wanted = arm, seed, epoch

    def on_fit_start(self, fit) -> None: ...

    def on_epoch_end(self, fit, row) -> None:
        if (fit.name, fit.seed, row["epoch"]) == self.wanted:
            raise KeyboardInterrupt

    def on_fit_end(self, fit, result) -> None: ...

    def on_exception(self, fit, error) -> None: ...


@pytest.fixture(scope="module")
def both(digits) -> Comparison:
    arms = {"plain": (), "resting": Resting()}
    return compare(Residual, digits, arms, seeds=[0, 1], equal="flops", placebo=True, **OPTIONS)


def test_seconds_are_told_of_arms_that_took_turns_alone(both):
    after = ["resting · equal flops", "resting · placebo"]
    assert [arm for arm in both.arms if not both.by_turns(arm)] == after
    assert both.saving("seconds", "resting", "plain").mean < 100
    for arm in after:
        assert math.isnan(both.paired("seconds", arm, "plain").mean)
        assert math.isnan(both.speedup(arm, "plain", level=0.0).mean)
        assert both.results[arm, 0].total("time/epoch_seconds") > 0
    told = both.frame.groupby("arm")["seconds"].count()
    assert told[both.given.arms].tolist() == [8, 8]
    assert told[after].tolist() == [0, 0]
    assert "took turns" in repr(both)
    assert "took turns" not in repr(both.given)


def test_the_baseline_of_equal_cost_has_the_steps_that_the_arm_s_cost_buys(both):
    assert both.arms == ["plain", "resting", "resting · equal flops", "resting · placebo"]
    for seed in (0, 1):
        plain, resting, short = (both.results[arm, seed] for arm in both.arms[:3])
        ratio = both.paired("TFLOP", "resting", "plain").values[seed]
        assert 0.5 < ratio < 0.9
        assert short.steps == math.floor(plain.steps * ratio)
        bought = both.paired("TFLOP", "resting · equal flops", "resting").values[seed]
        assert 1 - 1 / short.steps < bought <= 1
        assert resting.steps == plain.steps == 20


def test_it_is_a_training_of_its_own_with_the_whole_schedule(both, digits, residual):
    short = both.results["resting · equal flops", 1]
    alone = fit(residual, digits, seed=1, max_steps=short.steps, **OPTIONS)
    assert same_weights(short.model, alone.model)
    assert len(short.history) == math.ceil(short.steps / 5)


def test_an_interrupted_comparison_ends_with_the_same_weights(both, digits, residual, tmp_path):
    options = {**OPTIONS, "equal": "flops", "placebo": True, "seeds": [0, 1], "checkpoint": tmp_path}
    arms = {"plain": (), "resting": Resting()}
    for stop in ("resting", "resting · equal flops", "resting · placebo"):
        with pytest.raises(KeyboardInterrupt):
            compare(residual, digits, arms, observers=[Stops(stop, seed=1, epoch=2)], **options)
    again = compare(residual, digits, arms, **options)
    assert again.equal == both.equal
    for key, result in again.results.items():
        assert same_weights(result.model, both.results[key].model), key


def test_a_placebo_saves_the_same_in_other_epochs(both):
    assert both.placebos == {"resting": "resting · placebo"}
    assert both.paired("TFLOP", "resting · placebo", "resting").values == pytest.approx((1, 1))
    for seed in (0, 1):
        rests = [row["resting/rests"] for row in both.results["resting · placebo", seed].history]
        assert rests == [1, 1, 0, 0]


def test_a_strategy_that_never_acts_costs_the_baseline_and_pays_for_nothing(digits, residual):
    arms = {"plain": (), "idle": Resting(first=100)}
    runs = compare(residual, digits, arms, seeds=[0, 1], equal="flops", placebo=True, **OPTIONS)
    assert runs.pays("idle").points.values == (0, 0)
    assert runs.pays("idle").verdict == "undecided"
    assert runs.pays("idle").length == 1
    assert runs.placebos == {}
    assert runs.failures == {}


def test_an_arm_that_fails_takes_along_what_stood_beside_it(digits, residual):
    class Fails(Resting):
        name: ClassVar[str] = "fails"

        def on_epoch_end(self, run) -> None:
            if run.generator.initial_seed() == 1:
                raise ValueError("broke")

    arms = {"plain": (), "resting": Resting(), "fails": Fails()}
    runs = compare(residual, digits, arms, seeds=[0, 1], equal="flops", keep_going=["fails"], **OPTIONS)
    assert runs.arms == ["plain", "resting", "resting · equal flops"]
    assert runs.failures == {"fails": "ValueError: broke"}


def test_equal_seconds_buy_as_many_steps_as_the_arm_s_seconds(digits, residual):
    runs = compare(residual, digits, {"plain": (), "resting": Resting()}, equal="seconds", **OPTIONS)
    ratio = runs.paired("seconds", "resting", "plain").mean
    assert runs.results["resting · equal seconds", 0].steps == max(1, math.floor(20 * ratio + 1e-6))


@pytest.mark.parametrize(("arms", "change", "message"), [
    ({"resting": Resting()}, {}, "needs a baseline, and every arm has strategies"),
    ({"plain": (), "resting": Resting()}, {"measure": False}, "needs measured costs"),
    ({"plain": (), "resting": Resting()}, {"equal": "joules"}, "'equal' should be 'none', 'flops' or 'seconds'"),
])
def test_what_equal_cost_needs_is_said_before_anything_is_trained(digits, residual, arms, change, message):
    with pytest.raises(LayerlabError, match=message):
        compare(residual, digits, arms, **{**OPTIONS, "equal": "flops", **change})


@pytest.mark.parametrize(("points", "verdict", "text"), [
    # Half-widths: 4.3027 × deviation / √3 = 2.484 × deviation.
    ((1.0, 1.1, 1.2), "yes", "pays: yes (+1.10 ± 0.25 points against training 51 % as long)"),
    ((-1.0, -1.1, -1.2), "no", "pays: no (−1.10 ± 0.25 points against training 51 % as long)"),
    ((0.2, 1.1, 2.0), "undecided", "pays: undecided (+1.1 ± 2.2 points against training 51 % as long)"),
    ((5.0,), "undecided", "pays: undecided (+5.000 points against training 51 % as long, one seed)"),
])
def test_it_pays_where_the_whole_interval_is_above_zero(points, verdict, text):
    pays = Pays(Estimate(points, "points"), 0.51)
    assert pays.verdict == verdict
    assert str(pays) == text


def test_pays_takes_the_seeds_in_pairs_and_the_length_in_steps():
    def result(top1: float, steps: int, seed: int, arm: str) -> FitResult:
        row = {"epoch": 1, "timestamp": 0, "test/top1": top1, "time/epoch_seconds": 1.0}
        return FitResult(nn.Identity(), [row], seed, arm, (), Settings(), steps)

    values = {"plain": (0.90, 100, 0.80, 100), "mine": (0.88, 100, 0.79, 100), "mine · equal": (0.85, 60, 0.75, 40)}
    results = {(arm, seed): result(each[2 * seed], int(each[2 * seed + 1]), seed, arm)
               for arm, each in values.items() for seed in (0, 1)}
    runs = Comparison(results, {}, "plain", {"mine": "mine · equal"})
    assert runs.pays("mine").points.values == pytest.approx((3.0, 4.0))
    assert runs.pays("mine").length == pytest.approx(0.5)
    assert runs.given.arms == ["plain", "mine"]
    with pytest.raises(LayerlabError, match="No baseline of equal cost was trained beside 'plain'"):
        runs.pays("plain")


def test_the_validation_half_is_evaluated_and_not_trained_on(digits, residual):
    data = digits.with_validation(every=4)
    result = fit(residual, data, epochs=1, batch_size=256, progress=False)
    assert (len(data.train), len(data.validation)) == (1075, 358)
    assert data.fingerprint != digits.fingerprint
    assert result.final["validation/top1"] == evaluate(result.model, data.validation)["test/top1"]
    assert result.chance == pytest.approx(digits.test.labels.bincount().max().item() / len(digits.test))


def test_only_the_arms_that_are_judged_have_companions(digits, residual):
    arms = {"plain": (), "resting": Resting(), "later": Resting(first=4)}
    runs = compare(residual, digits, arms, equal="flops", placebo=True, judged=["later"], **OPTIONS)
    assert runs.arms == ["plain", "resting", "later", "later · equal flops", "later · placebo"]
    assert list(explore.payoff({"digits": runs})["arm"]) == ["later"]
    with pytest.raises(LayerlabError, match=r"Unknown arm with strategies 'plain'\. Known: later, resting"):
        compare(residual, digits, arms, equal="flops", judged=["plain"], **OPTIONS)


class Sawtooth:
    """Falls to a tenth within each `stage` of its calls, and starts anew."""

    def __init__(self, stage: float) -> None:
        self.stage = stage

    def __call__(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda call: 0.1 ** (call % self.stage >= self.stage / 2))

    def stretched(self, factor: float) -> Sawtooth:
        return Sawtooth(self.stage * factor)


@pytest.mark.parametrize(("each", "stage"), [("epoch", 2), ("step", 10)])
def test_a_schedule_that_is_a_function_says_how_it_is_stretched(digits, residual, each, stage):
    options = {**OPTIONS, "schedule": Sawtooth(stage), "schedule_each": each}
    runs = compare(residual, digits, {"plain": (), "resting": Resting()}, equal="flops", **options)
    short = runs.results["resting · equal flops", 0]
    # Two stages of ten steps for plain training, as many of them in the shorter one: each half of the steps left.
    assert short.settings.schedule.stage == pytest.approx(short.steps / 2)
    assert short.settings.schedule_each == "step"
    alone = fit(residual, digits, **{**OPTIONS, "epochs": len(short.history), "max_steps": short.steps,
                                     "schedule": Sawtooth(short.steps / 2), "schedule_each": "step"})
    assert same_weights(alone.model, short.model)
    with pytest.raises(LayerlabError, match=r"give it a method stretched\(factor\)"):
        compare(residual, digits, {"plain": (), "resting": Resting()}, equal="flops",
                **{**OPTIONS, "schedule": lambda optimizer: Sawtooth(2)(optimizer)})


def test_the_table_and_the_figure_say_whether_each_arm_pays_and_what_it_is_above_its_placebo(both):
    table = explore.payoff({"digits": both})
    (row,) = table.to_dict("records")
    pays = both.pays("resting")
    assert (row["run"], row["arm"], row["pays"], row["seeds"]) == ("digits", "resting", pays.verdict, 2)
    assert row["equal cost, steps"] == f"{100 * pays.length:.0f} %"
    points = explore.margins({"digits": both})
    against = {name: tuple(part["points"]) for name, part in points.groupby("against")}
    assert against == {"plain training of the same cost": pays.points.values,
                       "its placebo": both.paired("top-1", "resting", "resting · placebo").values}
    assert len(explore.payoff({})) == 0
    (axes,) = figures.margins(points).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"digits: resting, pays: {pays.verdict}"]
