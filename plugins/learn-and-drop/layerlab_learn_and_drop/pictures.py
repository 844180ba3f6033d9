"""Cuts, steps, and the scores of each layer with what was decided on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from layerlab import figures
from layerlab_learn_and_drop.analysis import DROPPED, FROZEN, PLAIN

figures.bind(plain=[PLAIN], method=[DROPPED], others=[(FROZEN, "frozen")])


def cuts(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What dropping up to each layer saves, and what it stores: `analysis.cut_table` of several networks."""
    figure, (saved, stored) = figures.panels(2, height=3.8)
    for name, table in tables.items():
        look = figures.look(name)
        steps = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "drawstyle": "steps-post",
                 "markersize": 5, "markevery": max(1, len(table) // 6)}
        saved.plot(table["share"], table["FLOPs"], label=name, **steps)
        stored.plot(table["share"], table["features"], **steps | {"drawstyle": "default"})
    saved.set(xlabel="layers dropped", ylabel="forward FLOPs saved", title="What a drop saves")
    stored.set(xlabel="layers dropped", ylabel="features / image (uint8)",
               title="What it stores in float32", yscale="log")
    figures.ticks.logarithmic(stored.yaxis)
    stored.axhline(1, color="0.4", linewidth=1, linestyle="--")
    for axis in (saved, stored):
        figures.ticks.percent(axis.xaxis)
    figures.ticks.percent(saved.yaxis)
    figures.legend_below(figure, *saved.get_legend_handles_labels(), handlelength=3)
    return figure


def steps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Steps with a prefix frozen and dropped against the whole step: `analysis.step_costs` of several networks."""
    figure, axes = figures.panels(len(tables), height=3.8)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for way, part in table.groupby("way", sort=False):
            middle, look = part["time"], figures.look(str(way))
            axis.errorbar(part["FLOPs"], middle, label=way, marker=look.marker, linestyle=look.line, color=look.colour,
                          capsize=2, elinewidth=0.8, yerr=[middle - part["time low"], part["time high"] - middle])
        axis.plot([0, 1], [1, 0], color="0.4", linewidth=1, linestyle="--", label="FLOPs alone")
        axis.set(xlabel="prefix, share of the forward FLOPs", ylabel="time of a step against the whole",
                 xlim=(0, 1), ylim=(0, None))
        figures.entitle(axis, name)
        for which in (axis.xaxis, axis.yaxis):
            figures.ticks.percent(which)
    figures.legend_below(figure, *axes[0].get_legend_handles_labels(), handlelength=3)
    return figure


def scores(maps: Mapping[str, pd.DataFrame], score: str, edges: Mapping[str, Sequence[int]]) -> Figure:
    """A score of each layer in each epoch, `analysis.score_map` of several runs; below the line layers are gone."""
    labels = {"change": "log₁₀ of the relative change", "trend": "trend of its logarithm, per epoch"}
    return figures.layer_epoch_map(maps, labels[score], edges=edges, edge="the layers below it are dropped")
