"""Cuts, steps, and the scores of each layer with what was decided on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from layerlab import figures


def cuts(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What dropping up to each layer saves, and what it stores: `analysis.cut_table` of several networks."""
    figure, ((saved, stored),) = figures.canvas(2, width=5.6, height=3.8)
    for name, table in tables.items():
        saved.plot(table["share"], table["FLOPs"], label=name, drawstyle="steps-post")
        stored.plot(table["share"], table["features"])
    saved.set(xlabel="layers dropped", ylabel="forward FLOPs saved", title="What a drop saves")
    stored.set(xlabel="layers dropped", ylabel="features / image (uint8)", yscale="log",
                title="What it stores in float32")
    stored.axhline(1, color="0.4", linewidth=1, linestyle="--")
    for axis in (saved, stored):
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    saved.yaxis.set_major_formatter(PercentFormatter(1.0))
    saved.legend(loc="upper left")
    return figure


def steps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Steps with a prefix frozen and dropped against the whole step: `analysis.step_costs` of several networks."""
    figure, (axes,) = figures.canvas(len(tables), width=5.6, height=3.8)
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


def scores(maps: Mapping[str, pd.DataFrame], score: str, edges: Mapping[str, Sequence[int]]) -> Figure:
    """A score of each layer in each epoch, `analysis.score_map` of several runs; below the line layers are gone."""
    labels = {"change": "log₁₀ of the relative change", "trend": "trend of its logarithm, per epoch"}
    return figures.layer_epoch_map(maps, labels[score], edges=edges)
