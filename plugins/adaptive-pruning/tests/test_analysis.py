"""What the notebook computes from its runs: the choice of λ, and the claims."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest

from layerlab import compare, load_dataset
from layerlab_adaptive_pruning import analysis
from layerlab_adaptive_pruning.analysis import BASELINE, OURS, PEER


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=8, channels=3, limit=128, test_limit=64, device="cpu")


def test_both_methods_take_the_penalty_with_which_they_are_best_after_the_pruning(data):
    network = partial(analysis.residual_network, data.classes, 3, 11, 0.5)
    tried = compare(network, data.held_out(), analysis.candidates([0.01, 0.1], 0.8, 1, "zero"), seeds=[7],
                    epochs=2, batch_size=32, lr=0.05, progress=False)
    reached = {(OURS, 0.01): 0.3, (OURS, 0.1): 0.4, (PEER, 0.01): 0.5, (PEER, 0.1): 0.2}  # 0.1 is best for one
    for (name, _), run in tried.results.items():
        (strategy,) = run.strategies
        arm = OURS if strategy.name == "adaptive-pruning" else PEER
        assert name == f"{arm}, λ = {strategy.sparsity:g}"
        run.history[0]["test/top1"] = 1 - reached[arm, strategy.sparsity]  # before the pruning: does not count
        run.history[1]["test/top1"] = reached[arm, strategy.sparsity]
    table, chosen = analysis.sparsity_choice(tried)
    assert chosen == 0.01
    assert table.loc[table["chosen"], "top-1 pruned [%]"].tolist() == pytest.approx([30, 50])
    assert table.loc[table["chosen"], "top-1 dense [%]"].tolist() == pytest.approx([70, 50])
    arms = analysis.arms([0.8], 1, chosen, "merge")
    assert (arms[OURS].sparsity, arms[OURS].bridge, arms[PEER].sparsity) == (0.01, "merge", 0.01)


def measured(labels: list[str]) -> pd.DataFrame:
    """Two seeds; by stage s: 50 + s, 52 + s and 51 + s %, and 1, s + 1 and 2 times as fast."""
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "stage": stage, "top-1": (first + stage) / 100, "megabytes": size,
         "parameters": 1000 * size, "batch 1 ×": speed, "batch 128 ×": 2 * speed}
        for stage in range(len(labels)) for seed in (0, 1)
        for arm, first, size, speed in ((BASELINE, 50, 8.0, 1.0), (OURS, 52, 8.0 / (stage + 1), stage + 1.0),
                                        (PEER, 51, 8.0, 2.0))
    ])


def test_claims_are_of_the_papers_shares_wherever_these_stand():
    labels = analysis.stage_labels([0.9, 0.845, 0.646, 0.558, 0.25])
    assert labels == ["dense", "90% left", "84.5% left", "64.6% left", "55.8% left", "25% left"]
    values = analysis.claim_values(measured(labels), labels, [1, 128])
    assert {name: value[0] for name, value in values.items()} == pytest.approx({
        "gain-40": 2, "peer-40": 1, "gain-60": 2, "peer-60": 1, "gain-most": 2, "size": 1 / 5,
        "speed-1": 5, "peer-speed-1": 2.5, "speed-128": 10, "peer-speed-128": 2.5})
    assert all(len(value) == 2 for value in values.values())
    others = analysis.stage_labels([0.7, 0.4, 0.2])
    assert analysis.claim_values(measured(others), others, [1, 128]) == {}
    assert "speed-1" not in analysis.claim_values(measured(labels), labels, [128])
    assert analysis.comparison_line(measured(labels), 5, "25% left", [1]) == (
        "25% left, 1,333 against 8,000 parameters: +1.00 ± 0.00 points against network slimming, "
        "3 × as fast at batch 1")


def test_removing_dead_channels_from_known_networks_changes_nothing_and_none_may_be_asked_for():
    table = analysis.exactness(["resnet18"])
    assert table.loc["resnet18", "difference"] < 1e-5
    assert table.loc["resnet18", "left"] < 0.8 * table.loc["resnet18", "parameters"]
    assert analysis.exactness([]).empty
