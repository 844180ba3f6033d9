"""The paper's Figure 1, the timeline, and seconds against their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from layerlab import figures
from layerlab_comm_overlap.method.measuring import CHOSEN, VARIANTS
from layerlab_comm_overlap.method.stock import STOCK

_ALONE, *_SOME, _ALL = VARIANTS
figures.bind(plain=[_ALONE, "one process"], method=[_ALL], others=[*_SOME, CHOSEN, tuple(STOCK)])


def bars(frame: pd.DataFrame) -> Figure:
    """Seconds a step of each variant and of DDP as it comes, with quartiles, between the two bounds.

    One panel for each number of workers. How much of the way to the lower bound a variant goes stands in a column of
    its own at the right, where no bound crosses it.

    Args:
        frame: `analysis.against_bounds`.
    """
    groups = list(frame.groupby("workers"))
    tallest = max(len(part) for _, part in groups)
    figure, axes = figures.panels(len(groups), columns=1, width=8.5, height=0.3 * tallest + 1.2)
    for axis, (workers, part) in zip(axes, groups, strict=True):
        errors = [part["seconds"] - part["low"], part["high"] - part["seconds"]]
        colours = [figures.look(variant).colour for variant in part["variant"]]
        axis.barh(part["variant"], part["seconds"], xerr=errors, color=colours,
                  error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.3"})
        for place, share in enumerate(part["share"]):
            axis.annotate(f"{share:.0f} %".replace("-", "−"), (1.09, place), xycoords=axis.get_yaxis_transform(),
                          va="center", ha="right", fontsize=10, annotation_clip=False)
        axis.axvline(part["max"].iloc[0], color="0.1", linestyle="--", label="max(compute, communicate): 100 %")
        axis.axvline(part["sum"].iloc[0], color="0.1", linestyle=":", linewidth=2,
                     label="compute + communicate: 0 %")
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set(xlabel="seconds a step", ylabel="", title=f"{workers} workers; at the right: how much is hidden",
                 xlim=(0, None))
    figures.legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def links(frame: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Speed over the fastest DDP as it comes against the link's bandwidth, with 95 % intervals; a panel a number of
    workers.

    Args:
        frame: `analysis.by_link`.
        variants: to show.
    """
    groups = list(frame.groupby("workers"))
    figure, axes = figures.panels(len(groups), height=3.8)
    shown = [variant for variant in variants if variant in set(frame["variant"])]
    given = sorted(frame["Mbit/s"].unique(), key=lambda each: each or float("inf"))
    for axis, (workers, part) in zip(axes, groups, strict=True):
        for number, variant in enumerate(shown):
            rows, look = part[part["variant"] == variant].set_index("Mbit/s").loc[given], figures.look(variant)
            at = [place + 0.06 * (number - (len(shown) - 1) / 2) for place in range(len(given))]
            below, above = rows["over DDP"] - rows["low over DDP"], rows["high over DDP"] - rows["over DDP"]
            axis.errorbar(at, rows["over DDP"], [below.clip(0), above.clip(0)], marker=look.marker, capsize=3,
                          color=look.colour, linestyle=look.line, label=variant)
        axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(given)), [f"{each:g}" if each else "as it is" for each in given])
        axis.set(xlabel="link [Mbit/s]", title=f"{workers} workers",
                 ylabel="speed, the fastest DDP\nas it comes = 1")
    figures.legend_below(figure, *axes[0].get_legend_handles_labels(), handlelength=3)
    return figure


def timelines(spans: Mapping[str, pd.DataFrame]) -> Figure:
    """Which layer computes, which gradients travel, and when: a panel a variant, all over the same seconds.

    Args:
        spans: variant → `measuring.spans` with buckets named.
    """
    lanes = {"forward": 2, "backward": 2, "communicate": 1, "update": 0}
    layers = list(dict.fromkeys(frame_layer for frame in spans.values()
                                for frame_layer in frame.loc[frame["kind"] == "forward", "what"]))
    short = [layer.rpartition(".")[2] for layer in layers]
    # Layers have an order, and so have these colours.
    colours = dict(zip(short, plt.get_cmap("viridis")(np.linspace(0, 1, len(short))), strict=True))
    figure, axes = figures.panels(len(spans), columns=1, width=10.4, height=1.9, sharex=True)
    longest = max(frame["end"].max() for frame in spans.values())
    for axis, (title, frame) in zip(axes, spans.items(), strict=True):
        for row in frame.itertuples():
            name = str(row.what).rpartition(".")[2]
            hatch = "////" if row.kind == "backward" else None
            axis.barh(lanes[row.kind], row.end - row.start, left=row.start, height=0.82, hatch=hatch, linewidth=0.3,
                      color=colours.get(name.partition("–")[0], "0.7"), edgecolor="white")
        axis.set_yticks([0, 1, 2], ["update", "communication", "compute"])
        axis.set(title=title, xlim=(0, 1.01 * longest))
        axis.grid(axis="y", visible=False)
    axes[-1].set_xlabel("seconds")
    handles = [Patch(color=colours[name], label=name) for name in short]
    handles += [Patch(facecolor="0.8", label="forward"), Patch(facecolor="0.8", hatch="////", edgecolor="white",
                                                               label="backward")]
    figures.legend_below(figure, handles, [str(handle.get_label()) for handle in handles], title_fontsize=10,
                         title="layer (of a bucket: its first in the order of the forward pass)")
    return figure


def figure_1(frame: pd.DataFrame, sweep: pd.DataFrame, announced: pd.DataFrame, claimed: float, at: int) -> Figure:
    """Learning speed against the number of GPUs; what overlap gains; what it gains on other links; all by the model.

    Bands: as far as the model was off where there is a measurement.

    Args:
        frame: `model.scaling`.
        sweep: `model.gain_by_bandwidth` at `at` workers.
        announced: published speeds, indexed by the number of GPUs, with `speed` and `more than without [%]`.
        claimed: the gain that the paper claims there.
        at: workers.
    """
    figure, (speed, gain, link) = figures.panels(3, height=3.9)
    variants = list(dict.fromkeys(frame["variant"]))
    looks = figures.looks(variants)
    styles = {"ring": "-", "tree": "--"}
    for (variant, algorithm), part in frame.groupby(["variant", "algorithm"], sort=False):
        look = looks[variant]
        line = {"color": look.colour, "linestyle": styles[algorithm], "marker": look.marker, "markersize": 4}
        speed.plot(part["workers"], part["speed"], label=f"{variant}, {algorithm}", **line)
        band = {"color": look.colour, "alpha": 0.15 if algorithm == "ring" else 0.0, "linewidth": 0}
        speed.fill_between(part["workers"], part["speed low"], part["speed high"], **band)
        if variant != variants[0]:
            gain.plot(part["workers"], part["gain"], **line)
            gain.fill_between(part["workers"], part["gain low"], part["gain high"], **band)
    _draw_published(speed, gain, announced, [variants[0], variants[-1]], claimed, at)
    numbers = sorted(set(frame["workers"]))
    speed.plot(numbers, numbers, color="0.6", linewidth=0.9, label="ideal")
    speed.set(xlabel="GPUs (workers)", ylabel="learning speed, one = 1", title="by the model")
    gain.set(xlabel="GPUs (workers)", ylabel=f"gain over {variants[0]}", title="what overlap gains")
    last = looks[variants[-1]]
    link.plot(sweep["ratio"], sweep["limit"], color="0.6", linewidth=0.9, linestyle="-.", label="limit of the gain")
    link.plot(sweep["ratio"], sweep["gain"], color=last.colour, marker=last.marker, markersize=4)
    link.axhline(claimed, color="k", linewidth=0.9, linestyle=":", label=f"claimed: {claimed:g}×")
    link.set(xlabel="communicate / compute, by the link's bandwidth", ylabel=f"gain at {at} workers, ring",
             title="on other links")
    for axis in (speed.xaxis, speed.yaxis, gain.xaxis, link.xaxis):
        figures.ticks.logarithmic(axis, base=4)
    handles = {label: handle for axis in (speed, gain, link)
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles["as far as the model was off where there is a measurement"] = Patch(color=last.colour, alpha=0.15)
    figures.legend_below(figure, list(handles.values()), list(handles), handlelength=3)
    return figure


def _draw_published(
    speed: Any, gain: Any, announced: pd.DataFrame, ends: Sequence[str], claimed: float, at: int
) -> None:
    """The speeds that were announced, without and with overlap, and the gain that the paper claims."""
    published = {ends[0]: announced["speed"] / (1 + announced["more than without [%]"] / 100),
                 ends[1]: announced["speed"]}
    for variant, points in published.items():
        speed.plot(points.index, points, "P", markersize=8, markerfacecolor="white", color=figures.look(variant).colour,
                   label=f"{variant}, announced (AlexNet, 2016)")
    gain.plot([at], [claimed], "k*", markersize=11, label=f"claimed: {claimed:g}× at {at}")
