"""The two pictures that only this method needs."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


def cuts(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What dropping up to each layer saves, and what it stores: `analysis.cut_table` of several networks."""
    figure, axes = _canvas()
    for name, table in tables.items():
        axes[0].plot(table["share"], table["FLOPs"], label=name, drawstyle="steps-post")
        axes[1].plot(table["share"], table["features"])
    axes[0].set(xlabel="layers dropped", ylabel="forward FLOPs saved", title="What a drop saves")
    axes[1].set(xlabel="layers dropped", ylabel="features / image (uint8)", yscale="log",
                title="What it stores in float32")
    axes[1].axhline(1, color="0.4", linewidth=1, linestyle="--")
    for axis in axes:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(loc="upper left")
    return figure


def steps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Steps with a prefix frozen and dropped against the whole step: `analysis.step_costs` of several networks."""
    figure, axes = _canvas(len(tables))
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for way, part in table.groupby("way", sort=False):
            middle = part["time"]
            axis.errorbar(part["FLOPs"], middle, label=way, marker="o", capsize=2, elinewidth=0.8,
                          yerr=[middle - part["time low"], part["time high"] - middle])
        axis.plot([0, 1], [1, 0], color="0.4", linewidth=1, linestyle="--", label="FLOPs alone")
        axis.set(xlabel="prefix, share of the forward FLOPs", ylabel="time of a step against the whole", title=name,
                 xlim=(0, 1), ylim=(0, None))
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(loc="lower left")
    return figure


def _canvas(columns: int = 2) -> tuple[Figure, list]:
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={
        "axes.grid": True, "grid.alpha": 0.35, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "font.size": 10})
    figure, axes = plt.subplots(1, columns, figsize=(5.6 * columns, 3.8), squeeze=False)
    return figure, list(axes[0])
