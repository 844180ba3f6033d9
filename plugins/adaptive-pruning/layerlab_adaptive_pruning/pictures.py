"""What the notebook draws: which layers and channels survive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from torch import nn

from layerlab import Comparison, figures
from layerlab_adaptive_pruning.analysis import BASELINE, OURS, PEER, pruning_of


def survival(comparison: Comparison, seed: int, labels: Sequence[str]) -> Figure:
    """Which layers and channels survive: the share of each batch norm's channels left, layer by layer, stage by stage.

    Args:
        seed: of the runs that are shown.
        labels: of the stages.
    """
    shown = [arm for arm in (OURS, PEER) if (arm, seed) in comparison.results]
    count_layers = len(pruning_of(comparison.results[shown[0], seed]).stages[0]["channels"])
    figure, axes = figures.canvas(rows=len(shown), width=min(16.0, max(8.0, 0.36 * count_layers)), height=2.5)
    for axis, arm in zip(axes[:, 0], shown, strict=True):
        noted = pruning_of(comparison.results[arm, seed]).stages
        first = noted[0]["channels"]
        order = _forward(comparison.results[BASELINE, seed].model, list(first))
        left = np.array([[stage["channels"][path] / first[path] for path in order] for stage in noted])
        colours = sns.color_palette("viridis", as_cmap=True).with_extremes(bad="#c94c4c")
        sns.heatmap(np.where(left == 0, np.nan, left), ax=axis, vmin=0, vmax=1, cmap=colours, linewidths=0.4,
                    linecolor="white", mask=np.zeros_like(left, dtype=bool), cbar_kws={"label": "channels left"})
        axis.grid(False)
        axis.set_facecolor("#c94c4c")
        gone = int((left[-1] == 0).sum())
        axis.set_title(f"{arm}: {gone} of {len(order)} batch norms are gone" if gone else f"{arm}: no layer is gone")
        axis.set_yticklabels(labels[: len(noted)], rotation=0)
        axis.set_xticks(np.arange(len(order)) + 0.5, order if len(order) <= 45 else [""] * len(order), rotation=90,
                        fontsize=7)
        if len(order) > 45:
            axis.set_xlabel("batch norms in forward order")
    return figure


def _forward(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Batch norms in the order of the modules, which is the order in which a traced network runs."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(paths, key=lambda path: order.get(path, len(order)))
