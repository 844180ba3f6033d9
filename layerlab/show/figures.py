"""The plots. Each function takes tables as the rest of layerlab makes them and returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from layerlab.show import ticks as ticks
from layerlab.show.canvas import Picture as Picture
from layerlab.show.canvas import canvas as canvas
from layerlab.show.canvas import entitle as entitle
from layerlab.show.canvas import legend_below as legend_below
from layerlab.show.canvas import panels as panels
from layerlab.show.canvas import picture as picture
from layerlab.show.canvas import png as png
from layerlab.show.canvas import wrapped
from layerlab.show.heat_maps import layer_epoch_map as layer_epoch_map
from layerlab.show.heat_maps import layer_maps as layer_maps
from layerlab.show.heat_maps import name_rows as name_rows
from layerlab.show.interval import mean_interval, with_minus
from layerlab.show.looks import EQUAL, PLACEBO
from layerlab.show.looks import Look as Look
from layerlab.show.looks import bind as bind
from layerlab.show.looks import look as look
from layerlab.show.looks import looks as looks
from layerlab.show.looks import tones as tones

LABELS = {
    "epoch": "epoch",
    "seconds": "training time [s]",
    "test/top1": "test accuracy, top-1",
    "test/top5": "test accuracy, top-5",
    "train/loss": "training loss",
}
# Curves with bands at most: those of more hide each other.
_BANDS = 5
# Inches from one mark to the next of several at one point.
_ASIDE = 0.11


def curves(frame: pd.DataFrame, y: str, x: Sequence[str] = ("epoch", "time"), title: str = "") -> Figure:
    """Learning curves of the arms of a comparison: mean over seeds with the 95 % band, each seed thin.

    Args:
        frame: `Comparison.frame`. With a column `panel`, each of its values has a panel of that title, over epochs and
            with a range of its own, so that arms which are far apart do not flatten each other.
        y: the metric.
        x: one panel each, a column or `time`: the seconds of training as a multiple of those that the first arm took
            for as many epochs, which a machine that is busy at times leaves as it is. The mean over seeds is taken
            epoch by epoch.
    """
    first = str(frame["arm"].iloc[0])
    labels = LABELS | {"time": wrapped(f"training time, in epochs of {first}", 4.2)}
    drawn = looks(list(frame["arm"]))
    parts = {"": frame}
    if "panel" in frame:
        parts, x = dict(list(frame.groupby("panel"))), ("epoch",)
    figure, axes = panels(len(parts) * len(x), max(2, len(parts)), width=min(5.2, 12 / len(parts)), height=3.6)
    for axis, ((name, part), along) in zip(axes, product(parts.items(), x), strict=True):
        if along == "time":
            part = part.assign(time=_relative_time(part, first))
        _curves_of(axis, part, along, y, drawn)
        axis.set(xlabel=labels.get(along, along), ylabel=labels.get(y, y), title=name)
    handles = {label: handle for axis in axes
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend_below(figure, list(handles.values()), list(handles), handlelength=3.2)
    if title:
        figure.suptitle(title)
    return figure


def _curves_of(axis: Any, part: pd.DataFrame, x: str, y: str, drawn: Mapping[str, Look]) -> None:
    own = [arm for arm in drawn if arm in set(part["arm"])]
    for arm in own:
        _curve(axis, part[part["arm"] == arm], x, y, drawn[arm], bands=len(own) <= _BANDS)
    if x == "epoch":
        ticks.whole(axis.xaxis)
    if y.startswith("test/top"):
        ticks.percent(axis.yaxis)
        low, high = part[y].min(), part[y].max()
        margin = 0.06 * (high - low) or 0.01
        axis.set_ylim(max(-0.004, low - margin), min(1.004, high + margin))


def _relative_time(frame: pd.DataFrame, first: str) -> list[float]:
    """Epochs of the arm `first` that take as long as each row's training up to its epoch, under the same seed.

    Both took turns epoch by epoch, so that whatever slows the machine is in both. Behind the last epoch of `first`, its
    mean epoch counts. NaN where an arm has no seconds, or `first` has none with that seed.
    """
    own = frame[frame["arm"] == first]
    reference = own.set_index(["seed", "epoch"])["seconds"]
    last = own.groupby("seed")["epoch"].max()
    times = []
    for seed, epoch, seconds in frame[["seed", "epoch", "seconds"]].itertuples(index=False):
        known = min(epoch, last.get(seed, 0))
        times.append(known * seconds / reference.get((seed, known), math.nan))
    return times


def _curve(axis: Any, part: pd.DataFrame, x: str, y: str, each: Look, bands: bool) -> None:
    several = part["seed"].nunique() > 1
    if several:
        for _, seed in part.groupby("seed"):
            axis.plot(seed[x], seed[y], color=each.colour, alpha=0.25, linewidth=0.8)
    mean = part.groupby("epoch")[[column for column in {x, y} if column != "epoch"]].mean()
    mean["epoch"] = mean.index
    axis.plot(mean[x], mean[y], color=each.colour, linestyle=each.line, marker=each.marker, markersize=4.5,
              markevery=max(1, len(mean) // 15), label=part["arm"].iloc[0])
    if x == "epoch" and several and bands:
        half = part.groupby("epoch")[y].apply(lambda values: mean_interval(list(values))[1])
        axis.fill_between(mean.index, mean[y] - half, mean[y] + half, color=each.colour, alpha=0.15, linewidth=0)


def layer_bars(
    frame: pd.DataFrame, value: Mapping[str, str], unit: str, title: str = "", log: bool = False
) -> Figure:
    """Bars of one or several quantities per layer.

    Args:
        frame: a row a layer with a column `layer`, in forward order.
        value: column → label.
        unit: of the y axis.
        log: logarithmic y axis, for quantities that are magnitudes apart.
    """
    figure, ((axis,),) = canvas(width=max(6.0, 0.75 * len(frame)))
    places, width = np.arange(len(frame)), 0.8 / len(value)
    for number, (column, label) in enumerate(value.items()):
        axis.bar(places + (number - (len(value) - 1) / 2) * width, frame[column], width, label=label,
                 color=tones(len(value))[number])
    names = frame["layer"].str.split(".").str[-1]
    axis.set_xticks(places, names, rotation=90 if len(frame) > 12 else 0)
    axis.set(xlabel="layer, from the input to the output", ylabel=unit)
    axis.grid(axis="x", visible=False)
    if log:
        ticks.logarithmic(axis.yaxis)
    if len(value) > 1:
        legend_below(figure, *axis.get_legend_handles_labels())
    if title:
        entitle(axis, title)
    return figure


def side_by_side(frame: pd.DataFrame, columns: Mapping[str, str], baseline: str = "") -> Figure:
    """Several quantities of the arms of a comparison, a panel each: seeds as small points, mean and 95 % interval.

    Args:
        frame: a row an arm and seed, `Comparison.runs` say.
        columns: column → label of its panel, with its unit.
        baseline: the arm whose mean is drawn on as a line.
    """
    drawn = looks(list(frame["arm"]))
    names = list(drawn)
    figure, axes = panels(len(columns), columns=3, width=3.4, height=max(2.1, 0.34 * len(names) + 0.9))
    for number, (axis, (column, label)) in enumerate(zip(axes, columns.items(), strict=True)):
        for place, (arm, each) in enumerate(drawn.items()):
            values = list(frame.loc[frame["arm"] == arm, column].dropna())
            if not values:
                continue
            mean = _seeds(axis, values, place, each.colour, each.marker)
            if arm == baseline:
                axis.axvline(mean, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(names)), names if number % 3 == 0 else [""] * len(names))
        axis.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(ticks.few(4))
    return figure


def _seeds(axis: Any, values: Sequence[float], place: float, colour: str, marker: str = "D") -> float:
    """Seeds as small points in a row, their mean with its 95 % interval; gives the mean."""
    mean, half = mean_interval(values)
    axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=3.5)
    axis.errorbar(mean, place, xerr=None if np.isnan(half) else half, fmt=marker, color=colour, markersize=6,
                  elinewidth=1.2, capsize=2.5)
    return mean


def margins(frame: pd.DataFrame, xlabel: str = "points of top-1 above it") -> Figure:
    """How far methods are above what they are held against: seeds as small points, mean and 95 % interval.

    Args:
        frame: a row a method, seed and comparison, with columns `title`, `against` and `points`; of
            `explore.margins`.
    """
    titles, kinds = list(dict.fromkeys(frame["title"])), list(dict.fromkeys(frame["against"]))
    figure, ((axis,),) = canvas(width=8.0, height=max(1.9, 0.6 * len(titles) + 1.0))
    colours = {kind: PLACEBO if "placebo" in kind else EQUAL for kind in kinds}
    shapes = {kind: "^" if "placebo" in kind else "D" for kind in kinds}
    for (title, kind), part in frame.groupby(["title", "against"], sort=False):
        place = titles.index(title) + 0.24 * (kinds.index(kind) - (len(kinds) - 1) / 2)
        _seeds(axis, list(part["points"]), place, colours[kind], shapes[kind])
    axis.axvline(0, color="0.4", linestyle="--", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(titles)), titles)
    axis.set(xlabel=xlabel, ylim=(len(titles) - 0.5, -0.5))
    axis.margins(x=0.12)
    handles = [plt.Line2D([], [], color=colours[kind], marker=shapes[kind], linestyle="") for kind in kinds]
    legend_below(figure, handles, [f"against {kind}" for kind in kinds])
    return figure


def fronts(
    frame: pd.DataFrame, x: Mapping[str, str], y: str, ylabel: str, front: Mapping[str, Sequence[str]]
) -> Figure:
    """Accuracy against several costs; a line joins the arms that no other beats in both, which are filled.

    Args:
        frame: a row an arm, with columns `arm`, y, those of x, and half-widths of intervals as `column ±`.
        x: column of a cost → label of its axis, with its unit.
        y: column of the accuracy.
        ylabel: its label, with its unit.
        front: column of a cost → arms on the Pareto front.
    """
    figure, axes = panels(len(x), height=3.5)
    drawn = looks(list(frame["arm"]))
    for axis, (column, label) in zip(axes, x.items(), strict=True):
        best = frame[frame["arm"].isin(front[column])].sort_values([column, y])
        axis.plot(best[column], best[y], color="0.35", linewidth=1, linestyle="--", zorder=0, drawstyle="steps-post")
        for _, row in frame.iterrows():
            each = drawn[row["arm"]]
            axis.errorbar(row[column], row[y], fmt=each.marker, color=each.colour, markersize=7, elinewidth=0.9,
                          capsize=2, markerfacecolor=each.colour if row["arm"] in front[column] else "white",
                          xerr=_bar(row[f"{column} ±"]), yerr=_bar(row[f"{y} ±"]))
        axis.set(xlabel=label, ylabel=ylabel)
        axis.margins(x=0.08, y=0.1)
        if "%" in ylabel:  # an interval may reach beyond what there is
            axis.set_ylim(top=min(axis.get_ylim()[1], 100.5))
    handles = [plt.Line2D([], [], color=each.colour, marker=each.marker, linestyle="") for each in drawn.values()]
    handles.append(plt.Line2D([], [], color="0.35", linewidth=1, linestyle="--"))
    legend_below(figure, handles, [*drawn, "filled: none is better in both"])
    return figure


def _bar(half: float) -> float | None:
    """Half the width of an interval as matplotlib takes it."""
    return None if np.isnan(half) else half


def payoff(frame: pd.DataFrame) -> Figure:
    """What strategies gain in accuracy against the time that they take, with what each is held against.

    Args:
        frame: a row a point, with columns `arm`, `kind` (`strategy`, or what stands beside it), `x` (time as a ratio to
            the baseline's), `y` (points of top-1 above it), and half-widths of intervals as `x ±` and `y ±`.
    """
    drawn, kinds = looks(list(frame["arm"])), list(dict.fromkeys(frame["kind"]))
    figure, ((axis,),) = canvas(width=6.4, height=4.2)
    fills = dict(zip(kinds, ("full", "none", "left"), strict=False))
    axis.axhline(0, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axis.axvline(1, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axis.plot([1], [0], "*", color="0.25", markersize=12, zorder=1)
    for arm, part in frame.groupby("arm", sort=False):
        first, each = part.iloc[0], drawn[arm]
        for number, (_, row) in enumerate(part.iterrows()):
            axis.errorbar(row["x"], row["y"], fmt=each.marker, color=each.colour, markersize=8, elinewidth=0.9,
                          capsize=2, fillstyle=fills[row["kind"]], markerfacecoloralt="white",
                          xerr=_bar(row["x ±"]), yerr=_bar(row["y ±"]))
            if number:
                axis.plot([first["x"], row["x"]], [first["y"], row["y"]], ":", color=each.colour, linewidth=1)
    axis.set(xlabel="time, as a multiple of the baseline's", ylabel="points of top-1 above the baseline")
    axis.margins(x=0.1, y=0.12)
    handles = [plt.Line2D([], [], color=each.colour, marker=each.marker, linestyle="") for each in drawn.values()]
    handles += [plt.Line2D([], [], color="0.35", marker="o", fillstyle=fills[kind], markerfacecoloralt="white",
                           linestyle="") for kind in kinds[1:]]
    handles.append(plt.Line2D([], [], color="0.25", marker="*", markersize=10, linestyle=""))
    legend_below(figure, handles, [*drawn, *kinds[1:], "the baseline"])
    return figure


def grouped_bars(frame: pd.DataFrame, x: str, y: str, hue: str, ylabel: str, percent: bool = False,
                 error: str | tuple[str, str] = "", xlabel: str = "", title: str = "", one: str = "") -> Figure:
    """Grouped bars with their values written on them.

    Args:
        frame: long table.
        x, y, hue: its columns.
        error: column of half-widths of intervals, or the two of their lower and upper ends.
        percent: y is a share, shown in per cent.
        one: what 1 is, for ratios; a line is drawn there.
    """
    figure, ((axis,),) = canvas(width=max(6.4, 0.62 * len(frame)), height=3.9)
    groups, drawn = list(dict.fromkeys(frame[x])), looks([str(name) for name in frame[hue]])
    width = 0.84 / len(drawn)
    # Upright numbers need the width of a bar.
    narrow = figure.get_figwidth() * 0.85 / len(groups) * width < 0.4
    for number, (name, each) in enumerate(drawn.items()):
        part = frame[frame[hue].astype(str) == name].set_index(x).reindex(groups)
        places = np.arange(len(groups)) + (number - (len(drawn) - 1) / 2) * width
        reach: Any = part[error] if isinstance(error, str) and error else None
        if isinstance(error, tuple):
            reach = [(part[y] - part[error[0]]).clip(0), (part[error[1]] - part[y]).clip(0)]
        bars = axis.bar(places, part[y], width, label=name, yerr=reach, color=each.colour,
                        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.3"}, edgecolor="white", linewidth=0.6)
        axis.bar_label(bars, fmt=lambda v: _short(v, percent), fontsize=9, padding=2,
                       rotation=90 if narrow else 0)
    names = [str(group) for group in groups]
    longest = max(len(line) for name in names for line in name.split("\n"))
    crowded = longest * 0.1 * len(groups) > figure.get_figwidth() * 0.85
    axis.set_xticks(np.arange(len(groups)), names, rotation=90 if crowded else 0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    entitle(axis, title)
    axis.margins(y=0.36 if narrow else 0.12)
    axis.grid(axis="x", visible=False)
    if percent:
        ticks.percent(axis.yaxis)
    handles, labels = axis.get_legend_handles_labels()
    if one:
        handles.append(axis.axhline(1, color="0.3", linestyle="--", linewidth=1))
        labels.append(f"1: {one}")
    legend_below(figure, handles, labels)
    return figure


def _short(value: float, percent: bool) -> str:
    """A number to three digits, for a bar."""
    return with_minus(f"{100 * value:.3g}%" if percent else f"{value:.3g}")


def tradeoff(frame: pd.DataFrame, x: str, y: str, label: str, panel: str, xlabel: str, ylabel: str,
             percent: bool = True) -> Figure:
    """Cost against accuracy, a point for each candidate, one panel for each value of `panel`.

    Candidates that ended at the same point stand side by side around it.

    Args:
        frame: a row a candidate, with columns x, y, label, panel and, for intervals, `x ±` and `y ±` named so.
        percent: x is a share, shown in per cent; y always is.
    """
    names, together = list(dict.fromkeys(frame[panel])), False
    figure, axes = panels(len(names), height=3.4)
    drawn = looks([str(name) for name in frame[label]])
    for axis, name in zip(axes, names, strict=True):
        for _, same in frame[frame[panel] == name].groupby([x, y], sort=False):
            for number, (_, point) in enumerate(same.iterrows()):
                each = drawn[str(point[label])]
                axis.errorbar(point[x], point[y], xerr=_bar(point.get(f"{x} ±", np.nan)),
                              yerr=_bar(point.get(f"{y} ±", np.nan)), fmt=",", color=each.colour, elinewidth=0.8,
                              capsize=2)
                aside = ScaledTranslation(_ASIDE * (number - (len(same) - 1) / 2), 0, figure.dpi_scale_trans)
                axis.plot(point[x], point[y], each.marker, color=each.colour, markersize=6.5,
                          transform=axis.transData + aside, clip_on=False)
                together = together or number > 0
        axis.set(xlabel=xlabel, ylabel=ylabel)
        entitle(axis, name)
        if percent:
            ticks.percent(axis.xaxis, 6)
        ticks.percent(axis.yaxis)
        axis.margins(x=0.12, y=0.15)
    handles = [plt.Line2D([], [], color=each.colour, marker=each.marker, linestyle="", markersize=6.5)
               for each in drawn.values()]
    if together:
        handles.append(plt.Line2D([], [], linestyle=""))
    legend_below(figure, handles, [*drawn, *(["side by side: at the same point"] if together else [])])
    return figure


def families(frame: pd.DataFrame, x: Mapping[str, str], y: str, family: str, label: str, ylabel: str,
             title: str = "", percent: bool = True) -> Figure:
    """Accuracy against several costs: each family of networks a line, each of its networks a shape; a panel a cost.

    Args:
        frame: a row a network, with the columns below and, for intervals, `y ±` named so.
        x: column of a cost → label of its axis, which is logarithmic.
        y: column of the accuracy.
        family, label: columns with the line's and the point's name.
        percent: y is a share, shown in per cent.
    """
    figure, axes = panels(len(x), height=3.5)
    drawn = looks([str(name) for name in frame[family]])
    points = [str(name) for name in dict.fromkeys(frame[label])]
    shapes = dict(zip(points, "osD^vPX<>" * len(points), strict=False))
    for axis, (column, text) in zip(axes, x.items(), strict=True):
        for name, each in drawn.items():
            part = frame[frame[family].astype(str) == name].sort_values(column)
            axis.plot(part[column], part[y], color=each.colour, linestyle=each.line, linewidth=1.3, zorder=1)
            for _, row in part.iterrows():
                axis.errorbar(row[column], row[y], yerr=_bar(row.get(f"{y} ±", np.nan)), marker=shapes[str(row[label])],
                              markersize=7, color=each.colour, elinewidth=0.8, capsize=2, markeredgecolor="white",
                              markeredgewidth=0.5)
        axis.set(xlabel=text, ylabel=ylabel)
        axis.margins(x=0.12, y=0.12)
        ticks.logarithmic(axis.xaxis, letters=True)
        if percent:
            ticks.percent(axis.yaxis)
    handles = [plt.Line2D([], [], color=each.colour, linestyle=each.line) for each in drawn.values()]
    handles += [plt.Line2D([], [], color="0.35", marker=shape, linestyle="") for shape in shapes.values()]
    legend_below(figure, handles, [*drawn, *points], handlelength=2.8)
    if title:
        figure.suptitle(title)
    return figure
