"""What the notebook shows: the annealing curves, savings by the paper's formula and measured, errors, freezing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from freezeout.strategy import FreezeOut, freezing_times, rate
from layerlab import measure

FLOPS = ("cost/forward_flops", "cost/backward_flops")
SECONDS = ("time/epoch_seconds",)


def annealing(layers: int, t_0: float) -> pd.DataFrame:
    """Fig. 1: α_i(t)/α of every layer under the paper's four variants.

    Returns:
        Long table: `variant`, `layer`, `t` (share of the training), `rate`.
    """
    rows = []
    for spacing in ("linear", "cubic"):
        for scaled in (False, True):
            variant = f"{spacing}, {'scaled' if scaled else 'unscaled'}"
            for layer, t_i in enumerate(freezing_times(layers, t_0, spacing), 1):
                rows += [{"variant": variant, "layer": layer, "t": step / 200, "rate": rate(step / 200, t_i, scaled)}
                         for step in range(201)]
    return pd.DataFrame(rows)


def annealing_figure(table: pd.DataFrame) -> Figure:
    """A panel a variant of `annealing`, a line a layer."""
    variants = list(dict.fromkeys(table["variant"]))
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={
        "axes.grid": True, "grid.alpha": 0.35, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "font.size": 10,
    })
    figure, axes = plt.subplots(1, len(variants), figsize=(3.3 * len(variants), 3.2), sharey=True)
    for axis, variant in zip(axes, variants, strict=True):
        part = table[table["variant"] == variant]
        sns.lineplot(part, x="t", y="rate", hue="layer", palette="viridis", ax=axis, legend=axis is axes[0])
        axis.set(title=variant, xlabel="t, share of the training", ylabel="learning rate, relative to α")
    axes[0].legend(title="layer", loc="upper right")
    return figure


def predicted_saving(costs: pd.DataFrame, times: Sequence[float]) -> dict[str, float]:
    """The share of training's operations that FreezeOut saves, in per cent, from shapes alone.

    Args:
        costs: from `layerlab.measure.layer_costs`.
        times: t_i of the same layers.

    Returns:
        `paper`: section 3's 1 − Σ(1 + t_i) c_i / Σ 2 c_i, in which a layer's backward costs as much as its forward.
        `counted`: with a backward of two products a layer (of its input and of its weights), and none of the image.
    """
    macs, dx = costs["forward_macs"].to_numpy(), costs["dx_macs"].to_numpy().copy()
    dx[0] = 0
    backward = dx + costs["dw_macs"].to_numpy()
    frozen = 1 - pd.Series(times).to_numpy()
    return {"paper": 100 * (frozen * macs).sum() / (2 * macs.sum()),
            "counted": 100 * (frozen * backward).sum() / (macs + backward).sum()}


def spent(result: Any, metrics: Sequence[str]) -> float:
    """The sum of metrics over a run."""
    return math.fsum(row[metric] for row in result.history for metric in metrics)


def saving(comparison: Any, metrics: Sequence[str], baseline: str, arm: str) -> list[float]:
    """Per cent of the sum of `metrics` over the run that the arm saves against the baseline, a value a seed."""
    spending = {method: [spent(comparison.results[method, seed], metrics) for seed in comparison.seeds]
                for method in (baseline, arm)}
    return [100 * (1 - less / full) for less, full in zip(spending[arm], spending[baseline], strict=True)]


def error(result: Any) -> float:
    """The share of test images that the trained network gets wrong."""
    return 1 - result.final["test/top1"]


def error_growth(comparison: Any, baseline: str, arm: str) -> list[float]:
    """By how many per cent of itself the baseline's test error is exceeded, a value a seed."""
    return [100 * (error(comparison.results[arm, seed]) / error(comparison.results[baseline, seed]) - 1)
            for seed in comparison.seeds]


def accuracy_loss(comparison: Any, baseline: str, arm: str) -> list[float]:
    """Points of final top-1 accuracy that the arm has less than the baseline, a value a seed."""
    return [100 * (error(comparison.results[arm, seed]) - error(comparison.results[baseline, seed]))
            for seed in comparison.seeds]


def savings(runs: Mapping[str, Any], predictions: Mapping[str, Mapping[str, float]], baseline: str, arm: str
            ) -> pd.DataFrame:
    """What is saved over the run, as a share, predicted and measured.

    Returns:
        One row a run and quantity: `run`, `what`, `saved` and, where it varies by seed, its half-width `±`.
    """
    rows = []
    for name, comparison in runs.items():
        rows.append({"run": name, "what": "operations, paper's formula", "saved": predictions[name]["paper"] / 100})
        rows.append({"run": name, "what": "operations, from shapes", "saved": predictions[name]["counted"] / 100})
        for what, metrics in (("FLOPs, measured", FLOPS), ("seconds, measured", SECONDS)):
            mean, half = measure.mean_interval([v / 100 for v in saving(comparison, metrics, baseline, arm)])
            rows.append({"run": name, "what": what, "saved": mean, "±": half})
    return pd.DataFrame(rows, columns=["run", "what", "saved", "±"])


def outcome(runs: Mapping[str, Any], baseline: str, arm: str) -> pd.DataFrame:
    """Time and error of both methods, means over seeds with half-widths of 95 % intervals.

    Returns:
        One row a run, indexed by it.
    """
    rows = []
    for name, comparison in runs.items():
        row: dict[str, Any] = {"run": name, "seeds": len(comparison.seeds)}
        columns = {
            "less time [%]": saving(comparison, SECONDS, baseline, arm),
            f"error, {baseline} [%]": [100 * error(comparison.results[baseline, seed]) for seed in comparison.seeds],
            f"error, {arm} [%]": [100 * error(comparison.results[arm, seed]) for seed in comparison.seeds],
            "error grows by [%]": error_growth(comparison, baseline, arm),
        }
        for column, values in columns.items():
            mean, half = measure.mean_interval(values)
            row[column] = f"{mean:.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")
        rows.append(row)
    return pd.DataFrame(rows).set_index("run")


def freezing_map(strategy: FreezeOut, epochs: int) -> pd.DataFrame:
    """Which layer learned (0) or was frozen (1) in which epoch: layers in forward order × epochs."""
    return pd.DataFrame(
        {epoch: [int(last < epoch) for last in strategy.last_epochs] for epoch in range(1, epochs + 1)},
        index=strategy.layers,
    )


def against_shorter(comparison: Any, shorter: Any, arm: str) -> list[float]:
    """Points of final top-1 accuracy that the arm has more than plain training of fewer epochs, a value a seed."""
    (plain,) = shorter.arms
    return [100 * (error(shorter.results[plain, seed]) - error(comparison.results[arm, seed]))
            for seed in comparison.seeds]


def in_force(claims: Mapping[str, Sequence[float]], paper: Any, conditions: Mapping[str, Any]
             ) -> dict[str, Sequence[float]]:
    """The claims that can be judged: one of no effect has no direction to hold to under other conditions."""
    return {
        name: values for name, values in claims.items()
        if paper.claim(name).neutral is not None
        or all(conditions.get(key) == value for key, value in paper.claim(name).conditions.items())
    }
