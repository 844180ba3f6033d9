"""Early stopping by the validation half: when it stops, how it goes on, and what is said of the epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerlab import Fit, Refused, compare, fit, load_dataset, strategies
from layerlab.training.stopping import waited

SETTINGS: dict[str, Any] = {"epochs": 30, "patience": 2, "lr": 0.3, "batch_size": 32}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", limit=256, test_limit=100, device="cpu").with_validation()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def _same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_fit_ends_when_its_validation_half_got_no_better_for_so_many_epochs(digits):
    result = fit(network, digits, progress=False, **SETTINGS)
    shares = [row["validation/top1"] for row in result.history]
    assert len(shares) < 30
    assert max(shares) == shares[-3] > max(shares[:-3])
    assert all(waited(result.history[:epoch]) < 2 for epoch in range(len(shares)))
    assert result.steps == len(shares) * (205 // 32)
    assert f"after {len(shares)} of 30 epochs" in str(result)
    # The same epochs as without patience: its end is all that it decides.
    longer = fit(network, digits, progress=False, **{**SETTINGS, "patience": None})
    assert [row["train/loss"] for row in longer.history[: len(shares)]] == [row["train/loss"] for row in result.history]


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_an_interrupted_fit_stops_where_the_undisturbed_one_does(digits, tmp_path, averaging):
    settings = {**SETTINGS, "averaging": averaging}
    whole = fit(network, digits, progress=False, **settings)
    first = Fit(network, digits, checkpoint=tmp_path, **settings)
    for _ in range(len(whole.history) - 1):
        first.train_epoch()
    for _ in range(2):  # the second time it is finished when it begins
        again = fit(network, digits, checkpoint=tmp_path, progress=False, **settings)
        assert _same(again.model, whole.model)
        assert len(again.history) == len(whole.history)


def test_the_averages_that_were_evaluated_last_are_the_weights_that_are_left(digits):
    from layerlab import evaluate

    result = fit(network, digits, progress=False, **SETTINGS, averaging="ema", averaging_decay=0.99)
    assert len(result.history) < 30
    assert evaluate(result.model, digits.test)["test/loss"] == pytest.approx(result.final["test/loss"], rel=1e-6)


def test_arms_stop_each_by_itself_and_the_baseline_of_equal_cost_spends_its_budget(digits):
    runs = compare(network, digits, {"full": (), "other": strategies("memory-reorder")}, seeds=[0, 1], equal="flops",
                   progress=False, **SETTINGS)
    lengths = {len(result.history) for (arm, _), result in runs.results.items() if "equal" not in arm}
    assert len(lengths) > 1
    assert f"{min(len(each.history) for each in runs.results.values())} to " in str(runs)
    for seed in (0, 1):
        arm, equal = runs.results["other", seed], runs.results["other · equal flops", seed]
        assert equal.settings.patience is None
        assert equal.steps == pytest.approx(arm.steps, abs=1)


def test_patience_without_a_validation_half_is_refused():
    digits = load_dataset("digits", limit=256, test_limit=100, device="cpu")
    with pytest.raises(Refused, match=r"patience=2 waits for the validation half.*`data.with_validation\(\)` sets"):
        fit(network, digits, **SETTINGS)


def test_where_there_are_no_classes_the_validation_loss_decides():
    assert waited([{"validation/loss": loss} for loss in (3.0, 1.0, 2.0, 1.5)]) == 2
    assert waited([]) == 0
