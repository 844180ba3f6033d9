"""What the notebook shows: savings, accuracy, and the paper's table with the measured numbers beside the published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from layerlab import measure

FLOPS = ("cost/forward_flops", "cost/backward_flops")
SECONDS = ("time/epoch_seconds",)


def saving(comparison: Any, metrics: Sequence[str], baseline: str, arm: str) -> list[float]:
    """Per cent of the sum of `metrics` over the run that the arm saves against the baseline, a value a seed."""
    def spent(method: str, seed: int) -> float:
        return math.fsum(row[metric] for row in comparison.results[method, seed].history for metric in metrics)

    return [100 * (1 - spent(arm, seed) / spent(baseline, seed)) for seed in comparison.seeds]


def gain(comparison: Any, baseline: str, arm: str) -> list[float]:
    """Points of final top-1 accuracy that the arm has more than the baseline, a value a seed."""
    return [100 * (comparison.results[arm, seed].final["test/top1"]
                   - comparison.results[baseline, seed].final["test/top1"]) for seed in comparison.seeds]


def table_1(published: pd.DataFrame, comparison: Any, dataset: str, baseline: str) -> pd.DataFrame:
    """The paper's table, with a row of the same columns for each arm that was run here: means over seeds."""
    rows = {}
    for arm in comparison.arms:
        top1 = measure.mean_interval([100 * comparison.results[arm, seed].final["test/top1"]
                                      for seed in comparison.seeds])[0]
        saved = measure.mean_interval(saving(comparison, FLOPS, baseline, arm))[0]
        rows[f"{arm} (here, {dataset})"] = [round(top1, 1), round(saved, 1)]
    measured = pd.DataFrame.from_dict(rows, orient="index", columns=list(published.columns))
    table = pd.concat([published.rename(index=lambda method: f"{method} (paper)"), measured])
    table.index.name = published.index.name
    return table
