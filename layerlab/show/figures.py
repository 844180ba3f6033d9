"""The plots. Each function takes tables as the rest of layerlab makes them and returns a matplotlib figure."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

if TYPE_CHECKING:
    from layerlab.show.layer_map import LayerMap


def picture(content: bytes) -> str:
    """A PNG as an HTML element."""
    import base64

    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" style="max-width: 100%">'


LABELS = {
    "epoch": "epoch",
    "seconds": "training time [s]",
    "test/top1": "test accuracy, top-1",
    "test/top5": "test accuracy, top-5",
    "train/loss": "training loss",
}


def canvas(
    columns: int = 1, rows: int = 1, width: float = 6.0, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure in the theme of all our plots, and its axes.

    Args:
        columns, rows: of panels.
        width, height: of a panel, in inches.
        options: of `matplotlib.pyplot.subplots`.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={
        "axes.grid": True, "grid.alpha": 0.35, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "font.size": 10,
    })
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    return figure, axes


def curves(frame: pd.DataFrame, y: str, x: Sequence[str] = ("epoch", "seconds"), title: str = "") -> Figure:
    """Learning curves of the arms of a comparison: mean over seeds with the 95 % band, each seed thin.

    Args:
        frame: `Comparison.frame`.
        y: the metric.
        x: one panel each; over `seconds` the mean is taken epoch by epoch.
    """
    figure, axes = canvas(len(x))
    arms = list(dict.fromkeys(frame["arm"]))
    colours = dict(zip(arms, sns.color_palette("colorblind", len(arms)), strict=True))
    for panel, axis in zip(x, axes[0], strict=True):
        for arm in arms:
            part = frame[frame["arm"] == arm]
            if part["seed"].nunique() > 1:
                for _, seed in part.groupby("seed"):
                    axis.plot(seed[panel], seed[y], color=colours[arm], alpha=0.25, linewidth=0.8)
            mean = part.groupby("epoch")[[column for column in {panel, y} if column != "epoch"]].mean()
            mean["epoch"] = mean.index
            axis.plot(mean[panel], mean[y], color=colours[arm], label=arm, marker="o", markersize=3.5)
            # Bands of more arms hide each other and the curves.
            if panel == "epoch" and part["seed"].nunique() > 1 and len(arms) <= 5:
                from layerlab.show.interval import mean_interval

                half = part.groupby("epoch")[y].apply(lambda values: mean_interval(list(values))[1])
                axis.fill_between(mean.index, mean[y] - half, mean[y] + half, color=colours[arm], alpha=0.15,
                                  linewidth=0)
        axis.set(xlabel=LABELS.get(panel, panel), ylabel=LABELS.get(y, y))
        if panel == "epoch":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if y.startswith("test/top"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            low, high = frame[y].min(), frame[y].max()
            margin = 0.06 * (high - low + 1e-9)
            axis.set_ylim(max(0.0, low - margin), min(1.0, high + margin))
    if len(arms) > 5:  # inside, so many lines of text would cover the curves
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(x))
    else:
        axes[0][0].legend(loc="best")
    if title:
        figure.suptitle(title)
    return figure


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
    figure, axes = canvas(width=max(6.0, 0.75 * len(frame)))
    axis = axes[0][0]
    long = frame.melt("layer", list(value), "part", "value")
    long["part"] = long["part"].map(dict(value))
    long["layer"] = long["layer"].str.split(".").str[-1]
    sns.barplot(long, x="layer", y="value", hue="part", ax=axis, legend="auto" if len(value) > 1 else False)
    axis.set(xlabel="", ylabel=unit)
    axis.tick_params(axis="x", rotation=45 if len(frame) > 10 else 0)
    if log:
        axis.set_yscale("log")
    if len(value) > 1:
        axis.get_legend().remove()
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    if title:
        axis.set_title(title)
    return figure


def layer_epoch_map(
    maps: Mapping[str, pd.DataFrame], label: str, states: Sequence[str] | None = None,
    edges: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """Layer × epoch heat maps, the layer nearest the input at the bottom.

    Args:
        maps: title → table with layers as index (input first) and epochs as columns.
        label: what the colour means.
        states: for integer tables: the names of 0, 1, …; drawn as two or more flat colours with a legend.
        edges: title → for each epoch a number of layers, counted from the input, above which a line is drawn.
    """
    tallest = max(len(table) for table in maps.values())
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = canvas(columns, rows, width=4.6, height=min(9.0, max(2.2, 0.32 * tallest + 1.0)))
    flat = list(axes.flat)
    for axis, (title, table) in zip(flat, maps.items(), strict=False):
        _heat_map(axis, title, table, label, states)
        for column, count in enumerate(edges[title] if edges else ()):
            if count:
                before = edges[title][column - 1] if edges and column else 0
                height = len(table) - count
                axis.plot([column, column, column + 1], [len(table) - before, height, height], color="crimson",
                          linewidth=2, solid_capstyle="butt", clip_on=False)
    for axis in flat[len(maps):]:
        axis.set_visible(False)
    if states is not None:
        figure.legend(_state_handles(states), list(states), loc="outside lower center", ncols=len(states))
    return figure


def layer_maps(maps: Mapping[str, LayerMap], title: str = "") -> Figure:
    """Layer × epoch maps of several quantities, each with colours of its own.

    Args:
        maps: `FitResult.layer_maps`.
    """
    tallest = max(len(each.table) for each in maps.values())
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = canvas(columns, rows, width=5.6, height=min(9.0, max(2.2, 0.24 * tallest + 1.0)))
    flat = list(axes.flat)
    for axis, (name, each) in zip(flat, maps.items(), strict=False):
        _heat_map(axis, name, each.table, each.label, each.states or None)
        if each.states:
            axis.legend(_state_handles(each.states), each.states, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for axis in flat[len(maps):]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title)
    return figure


def _state_colours(count: int) -> list[Any]:
    return ["#d9d9d9", *sns.color_palette("colorblind", max(1, count - 1))][:count]


def _state_handles(states: Sequence[str]) -> list[Any]:
    return [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _state_colours(len(states))]


def _heat_map(axis: Any, title: str, table: pd.DataFrame, label: str, states: Sequence[str] | None) -> None:
    shown = table.iloc[::-1].rename(index=lambda name: str(name).removeprefix("features."))
    options: dict[str, Any] = {"cmap": "viridis", "cbar_kws": {"label": label}}
    if states is not None:
        options = {"cmap": ListedColormap(_state_colours(len(states))), "vmin": -0.5, "vmax": len(states) - 0.5,
                   "cbar": False}
    # Of a deep network, rows are thin, lines between them would hide them, and not all names fit.
    sns.heatmap(shown, ax=axis, linewidths=0.5 if len(table) <= 40 else 0, linecolor="white", **options)
    axis.set(title=title, xlabel="epoch", ylabel="")
    # The names of 20 epochs or more would run into each other.
    every = -(-len(table.columns) // 12)
    axis.set_xticks(np.arange(0, len(table.columns), every) + 0.5, list(table.columns)[::every])
    axis.tick_params(axis="y", rotation=0)
    axis.tick_params(axis="x", rotation=0)
    axis.grid(False)


def side_by_side(frame: pd.DataFrame, columns: Mapping[str, str], baseline: str = "") -> Figure:
    """Several quantities of the arms of a comparison, a panel each: seeds as small points, mean and 95 % interval.

    Args:
        frame: a row an arm and seed, `Comparison.runs` say.
        columns: column → label of its panel, with its unit.
        baseline: the arm whose mean is drawn on as a line.
    """
    from layerlab.show.interval import mean_interval

    arms = list(dict.fromkeys(frame["arm"]))
    figure, axes = canvas(len(columns), width=2.6, height=max(2.1, 0.34 * len(arms) + 0.9))
    colours = sns.color_palette("colorblind", len(arms))
    for number, (axis, (column, label)) in enumerate(zip(axes[0], columns.items(), strict=True)):
        for place, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
            values = list(frame.loc[frame["arm"] == arm, column].dropna())
            if not values:
                continue
            mean, half = mean_interval(values)
            axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=3.5)
            axis.errorbar(mean, place, xerr=None if np.isnan(half) else half, fmt="D", color=colour, markersize=5,
                          elinewidth=1.2, capsize=2.5)
            if arm == baseline:
                axis.axvline(mean, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(arms)), arms if number == 0 else [""] * len(arms))
        axis.set(xlabel=label, ylim=(len(arms) - 0.5, -0.5))
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def margins(frame: pd.DataFrame, xlabel: str = "points of top-1 above it") -> Figure:
    """How far methods are above what they are held against: seeds as small points, mean and 95 % interval.

    Args:
        frame: a row a method, seed and comparison, with columns `title`, `against` and `points`; of
            `explore.margins`.
    """
    from layerlab.show.interval import mean_interval

    titles, kinds = list(dict.fromkeys(frame["title"])), list(dict.fromkeys(frame["against"]))
    figure, ((axis,),) = canvas(width=7.0, height=max(1.8, 0.55 * len(titles) + 0.9))
    colours = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    for (title, kind), part in frame.groupby(["title", "against"], sort=False):
        place = titles.index(title) + 0.24 * (kinds.index(kind) - (len(kinds) - 1) / 2)
        mean, half = mean_interval(list(part["points"]))
        axis.plot(part["points"], [place] * len(part), "o", color=colours[kind], alpha=0.35, markersize=3.5)
        axis.errorbar(mean, place, xerr=None if np.isnan(half) else half, fmt="D", color=colours[kind], markersize=5,
                      elinewidth=1.2, capsize=2.5)
    axis.axvline(0, color="0.4", linestyle="--", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(titles)), titles)
    axis.set(xlabel=xlabel, ylim=(len(titles) - 0.5, -0.5))
    axis.margins(x=0.12)
    handles = [plt.Line2D([], [], color=colours[kind], marker="D", linestyle="") for kind in kinds]
    figure.legend(handles, [f"against {kind}" for kind in kinds], loc="outside lower center", ncols=2)
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
    figure, axes = canvas(len(x), width=4.6, height=3.8)
    colours = dict(zip(frame["arm"], sns.color_palette("colorblind", len(frame)), strict=True))
    shapes = dict(zip(frame["arm"], "osD^vPX<>*" * len(frame), strict=False))
    for axis, (column, label) in zip(axes[0], x.items(), strict=True):
        best = frame[frame["arm"].isin(front[column])].sort_values([column, y])
        axis.plot(best[column], best[y], color="0.35", linewidth=1, linestyle="--", zorder=0, drawstyle="steps-post")
        for _, row in frame.iterrows():
            bars = {name: None if np.isnan(half) else half
                    for name, half in (("xerr", row[f"{column} ±"]), ("yerr", row[f"{y} ±"]))}
            colour = colours[row["arm"]]
            axis.errorbar(row[column], row[y], fmt=shapes[row["arm"]], color=colour, markersize=6.5, elinewidth=0.9,
                          capsize=2, markerfacecolor=colour if row["arm"] in front[column] else "white", **bars)
        axis.set(xlabel=label, ylabel=ylabel)
        axis.margins(x=0.08, y=0.1)
        if "%" in ylabel:  # an interval may reach beyond what there is
            axis.set_ylim(top=min(axis.get_ylim()[1], 100.5))
    handles = [plt.Line2D([], [], color=colours[arm], marker=shapes[arm], linestyle="") for arm in frame["arm"]]
    handles.append(plt.Line2D([], [], color="0.35", linewidth=1, linestyle="--"))
    figure.legend(handles, [*frame["arm"], "filled: none is better in both"], loc="outside lower center",
                  ncols=min(4, len(handles)))
    return figure


def payoff(frame: pd.DataFrame) -> Figure:
    """What strategies gain in accuracy against the time that they take, with what each is held against.

    Args:
        frame: a row a point, with columns `arm`, `kind` (`strategy`, or what stands beside it), `x` (time as a ratio to
            the baseline's), `y` (points of top-1 above it), and half-widths of intervals as `x ±` and `y ±`.
    """
    arms, kinds = list(dict.fromkeys(frame["arm"])), list(dict.fromkeys(frame["kind"]))
    figure, ((axis,),) = canvas(width=5.4, height=3.8)
    colours = dict(zip(arms, sns.color_palette("colorblind", len(arms)), strict=True))
    shapes = dict(zip(kinds, "osv", strict=False))
    axis.axhline(0, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axis.axvline(1, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axis.plot([1], [0], "*", color="0.25", markersize=11, zorder=1)
    for arm, part in frame.groupby("arm", sort=False):
        first = part.iloc[0]
        for number, (_, row) in enumerate(part.iterrows()):
            bars = {f"{name}err": None if np.isnan(row[f"{name} ±"]) else row[f"{name} ±"] for name in "xy"}
            axis.errorbar(row["x"], row["y"], fmt=shapes[row["kind"]], color=colours[arm], markersize=7,
                          elinewidth=0.9, capsize=2, alpha=0.65 if number else 1.0,
                          markerfacecolor="white" if number else colours[arm], **bars)
            if number:
                axis.plot([first["x"], row["x"]], [first["y"], row["y"]], ":", color=colours[arm], linewidth=1)
    axis.set(xlabel="time, as a multiple of the baseline's", ylabel="points of top-1 above the baseline")
    axis.margins(x=0.1, y=0.12)
    handles = [plt.Line2D([], [], color=colours[arm], marker="o", linestyle="") for arm in arms]
    handles += [plt.Line2D([], [], color="0.35", marker=shapes[kind], markerfacecolor="white", linestyle="")
                for kind in kinds[1:]]
    handles.append(plt.Line2D([], [], color="0.25", marker="*", markersize=9, linestyle=""))
    figure.legend(handles, [*arms, *kinds[1:], "the baseline"], loc="outside lower center", ncols=2)
    return figure


def png(figure: Figure, resolution: float = 100) -> bytes:
    """A figure as a PNG of so many pixels an inch; the figure is closed, so that no backend shows it a second time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=resolution, bbox_inches="tight")
    plt.close(figure)
    return stream.getvalue()


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure as it was kept, for display in a notebook, which would draw it a second time.

    Attributes:
        figure: matplotlib's.
        content: the PNG.
        resolution: its pixels an inch.
    """

    figure: Figure
    content: bytes = field(repr=False)
    resolution: float

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # In the size in which the notebook would show the figure itself; a PNG's width and height follow its first 16
        # bytes.
        width, height = (round(pixels * self.figure.dpi / self.resolution)
                         for pixels in struct.unpack(">II", self.content[16:24]))
        return self.content, {"width": width, "height": height}


def grouped_bars(frame: pd.DataFrame, x: str, y: str, hue: str, ylabel: str, percent: bool = False,
                 error: str | None = None, xlabel: str = "", title: str = "") -> Figure:
    """Grouped bars with their values written on them.

    Args:
        frame: long table.
        x, y, hue: its columns.
        error: column of half-widths of intervals.
        percent: y is a share, shown in per cent.
    """
    figure, axes = canvas(width=max(6.0, 0.55 * len(frame)))
    axis = axes[0][0]
    groups, hues = list(dict.fromkeys(frame[x])), list(dict.fromkeys(frame[hue]))
    width = 0.8 / len(hues)
    for number, name in enumerate(hues):
        part = frame[frame[hue] == name].set_index(x).reindex(groups)
        places = np.arange(len(groups)) + (number - (len(hues) - 1) / 2) * width
        errors = part[error] if error else None
        bars = axis.bar(places, part[y], width, label=name, yerr=errors,
                        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.3"})
        axis.bar_label(bars, fmt=(lambda v: f"{100 * v:.3g}%") if percent else "{:.3g}", fontsize=8, padding=2)
    axis.set_xticks(np.arange(len(groups)), [str(group) for group in groups])
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.margins(y=0.12)
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def tradeoff(frame: pd.DataFrame, x: str, y: str, label: str, panel: str, xlabel: str, ylabel: str,
             percent: bool = True) -> Figure:
    """Cost against accuracy, a point with its name for each candidate, one panel for each value of `panel`.

    Args:
        frame: a row a candidate, with columns x, y, label, panel and, for intervals, `x ±` and `y ±` named so.
        percent: x is a share, shown in per cent; y always is.
    """
    panels = list(dict.fromkeys(frame[panel]))
    columns = min(2, len(panels))
    figure, axes = canvas(columns, -(-len(panels) // columns), width=5.6)
    flat = list(axes.flat)
    for axis, name in zip(flat, panels, strict=False):
        part = frame[frame[panel] == name]
        kinds = list(dict.fromkeys(frame[label]))
        for colour, kind in zip(sns.color_palette("colorblind", len(kinds)), kinds, strict=True):
            point = part[part[label] == kind]
            axis.errorbar(point[x], point[y], xerr=point.get(f"{x} ±"), yerr=point.get(f"{y} ±"), fmt="o",
                          color=colour, elinewidth=0.8, capsize=2)
        # Candidates that ended at the same point share one label.
        for (right, up), same in part.groupby([x, y]):
            axis.annotate(" = ".join(map(str, same[label])), (right, up), xytext=(5, 4), textcoords="offset points",
                          fontsize=8)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=name)
        if percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.margins(x=0.18, y=0.15)
    for axis in flat[len(panels):]:
        axis.set_visible(False)
    return figure


def families(frame: pd.DataFrame, x: Mapping[str, str], y: str, family: str, label: str, ylabel: str,
             title: str = "") -> Figure:
    """Accuracy against several costs: each family of networks a line with named points, one panel a cost.

    Args:
        frame: a row a network, with the columns below and, for intervals, `y ±` named so.
        x: column of a cost → label of its axis, which is logarithmic.
        y: column of a share, shown in per cent.
        family, label: columns with the line's and the point's name.
    """
    figure, axes = canvas(len(x), width=5.6)
    names = list(dict.fromkeys(frame[family]))
    for axis, (column, text) in zip(axes[0], x.items(), strict=True):
        for number, (colour, name) in enumerate(zip(sns.color_palette("colorblind", len(names)), names, strict=True)):
            part = frame[frame[family] == name].sort_values(column)
            axis.errorbar(part[column], part[y], yerr=part.get(f"{y} ±"), marker="osD^v"[number % 5], markersize=5,
                          color=colour, elinewidth=0.8, capsize=2, alpha=0.85, label=name)
        # One name for networks that cost about the same, below the lowest of them.
        for point, same in frame.groupby(label):
            lowest = same.loc[same[y].idxmin()]
            axis.annotate(str(point), (lowest[column], lowest[y]), xytext=(0, -13), textcoords="offset points",
                          fontsize=8, ha="center")
        axis.set(xlabel=text, ylabel=ylabel, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.margins(x=0.15, y=0.15)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))
    if title:
        figure.suptitle(title)
    return figure
