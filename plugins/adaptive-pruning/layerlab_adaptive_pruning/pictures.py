"""What the notebook draws: which layers and channels survive, and what a user chooses from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from layerlab import Comparison, Estimate, figures
from layerlab_adaptive_pruning.analysis import BASELINE, OURS, PEER, pruning_of

figures.bind(plain=[BASELINE], method=[OURS], others=[PEER, "torch-pruning's BNScale", "torch-pruning's GroupNorm"])


def survival(comparison: Comparison, seed: int, labels: Sequence[str]) -> Figure:
    """Which layers and channels survive: the share of each batch norm's channels left, layer by layer, stage by stage.

    Args:
        seed: of the runs that are shown.
        labels: of the stages.
    """
    maps = {}
    for arm in (OURS, PEER):
        if (arm, seed) not in comparison.results:
            continue
        noted = pruning_of(comparison.results[arm, seed]).stages
        first = noted[0]["channels"]
        order = _forward(comparison.results[BASELINE, seed].model, list(first))
        left = np.array([[stage["channels"][path] / first[path] for stage in noted] for path in order])
        missing = int((left[:, -1] == 0).sum())
        title = f"{arm}: {missing} of {len(order)} batch norms are gone" if missing else f"{arm}: no layer is gone"
        columns = [label.removesuffix(" left") for label in labels[: len(noted)]]
        maps[title] = pd.DataFrame(np.where(left == 0, np.nan, left), index=order, columns=columns)
    return figures.layer_epoch_map(maps, "share of channels left", columns="parameters left after each stage",
                                   gone="the layer is gone")


def _forward(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Batch norms in the order of the modules, which is the order in which a traced network runs."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(paths, key=lambda path: order.get(path, len(order)))


def choices(table: pd.DataFrame, labels: Sequence[str], batches: Sequence[int], title: str = "") -> Figure:
    """Accuracy against parameters and latency, each pruned network against the conventional one after as many epochs.

    Later stages have trained for longer, so that accuracies as such would rise with pruning.

    Args:
        table: `analysis.speeds`.
        labels: of the stages.
        batches: images a batch for which inference was timed.
    """
    columns = {"parameters": "parameters"} | {
        f"batch {size} [ms]": f"latency, {size} image{'s' * (size > 1)} at a time [ms]" for size in batches}
    dense = table[table["arm"] == BASELINE].set_index(["seed", "stage"])["top-1"]
    rows = []
    for (arm, stage), part in table.groupby(["arm", "stage"], sort=False):
        # One point for the conventional network: it is its own measure in every stage.
        if bool(stage) == (arm == BASELINE):
            continue
        points = part["top-1"].to_numpy() - dense.reindex([(seed, stage) for seed in part["seed"]]).to_numpy()
        mean, half = Estimate(tuple(100 * points)).interval
        name = labels[0] if arm == BASELINE else f"{labels[stage]}, after {part['epoch'].iloc[0]} epochs"
        rows.append({"method": arm, "network": name, "points": mean, "points ±": half,
                     **{column: part[column].mean() for column in columns}})
    figure = figures.families(
        pd.DataFrame(rows), columns, "points", "method", "network", "points of top-1 against the\nconventional network",
        f"{title}: both after as many epochs", percent=False)
    for axis in figure.axes:
        axis.axhline(0, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    return figure
