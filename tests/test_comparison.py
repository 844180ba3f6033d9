"""What a comparison says of two arms: differences, ratios, savings and times, seed by seed, on worked examples."""

from __future__ import annotations

import math

import pytest
from torch import nn

from layerlab import Comparison, Estimate, FitResult, LayerlabError
from layerlab.training.settings import Settings

# Top-1 after each epoch, and seconds of each epoch: (arm, seed) → both.
RUNS = {
    ("full", 0): ([0.50, 0.70, 0.80], [10.0, 10.0, 10.0]),
    ("full", 1): ([0.40, 0.75, 0.74], [12.0, 12.0, 12.0]),
    ("skip", 0): ([0.55, 0.81, 0.82], [6.0, 5.0, 4.0]),
    ("skip", 1): ([0.45, 0.60, 0.70], [6.0, 6.0, 6.0]),
}


@pytest.fixture
def both() -> Comparison:
    results = {}
    for (arm, seed), (accuracies, seconds) in RUNS.items():
        history = [
            {"epoch": epoch, "timestamp": 0, "test/top1": top1, "time/epoch_seconds": spent,
             "cost/forward_flops": 1e12, "cost/backward_flops": 2e12 if arm == "full" else 1e12}
            for epoch, (top1, spent) in enumerate(zip(accuracies, seconds, strict=True), 1)
        ]
        results[arm, seed] = FitResult(nn.Identity(), history, seed, arm, (), Settings())
    return Comparison(results)


def test_accuracies_are_compared_in_points_and_costs_as_ratios(both):
    assert both.paired("top-1", "skip", "full").values == pytest.approx((2.0, -4.0))
    assert both.paired("top-1", "skip", "full").unit == "points"
    assert both.paired("best top-1", "skip", "full").values == pytest.approx((2.0, -5.0))
    assert both.paired("seconds", "skip", "full").values == pytest.approx((0.5, 0.5))
    assert str(both.paired("seconds", "skip", "full")) == "0.5000 ×"


def test_savings_are_per_cent_of_the_baseline(both):
    assert both.saving("seconds", "skip", "full").values == pytest.approx((50.0, 50.0))
    assert both.saving("TFLOP", "skip", "full").values == pytest.approx((100 / 3, 100 / 3))
    assert both.saving(lambda result: result.total("cost/backward_flops"), "skip", "full").mean == pytest.approx(50)


def test_time_to_an_accuracy_is_that_of_the_first_epoch_that_has_it(both):
    assert both.results["full", 1].time_to(0.74) == 24.0
    assert both.results["skip", 1].time_to(0.75) == math.inf
    assert both.speedup("skip", "full", level=0.7).values == pytest.approx((20 / 11, 24 / 18))


def test_a_seed_that_never_gets_there_has_no_speed_up_and_leaves_no_mean(both):
    speedup = both.speedup("skip", "full")
    assert speedup.values[0] == pytest.approx(30 / 11)
    assert math.isnan(speedup.values[1])
    assert math.isnan(speedup.mean)
    assert speedup.reached.values == speedup.values[:1]


def test_an_estimate_has_student_s_interval():
    estimate = Estimate((1.0, 2.0, 3.0), "points")
    # t with two degrees of freedom: 4.3027; the deviation is 1, so that the half-width is 4.3027 / √3.
    assert estimate.interval == (2.0, pytest.approx(4.30265 / math.sqrt(3), rel=1e-5))
    assert estimate.low == pytest.approx(2.0 - 2.48414, rel=1e-4)
    assert str(estimate) == "2.0 ± 2.5 points"
    assert math.isnan(Estimate((1.0,)).half)


def test_an_arm_that_is_not_there_is_named(both):
    with pytest.raises(LayerlabError, match=r"Unknown arm .skp.\. Did you mean .skip."):
        both.paired("top-1", "skp", "full")
