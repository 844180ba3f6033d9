"""The paper's Figure 1, the timeline, and seconds against their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from layerlab import figures


def bars(frame: pd.DataFrame) -> Figure:
    """Seconds a step of each variant and of DDP as it comes, with quartiles, between the two bounds.

    One panel for each number of workers.

    Args:
        frame: `analysis.against_bounds`.
    """
    groups = list(frame.groupby("workers"))
    figure, axes = figures.canvas(len(groups), width=6.4, height=4.2)
    colours = sns.color_palette("colorblind")
    for axis, (workers, part) in zip(axes[0], groups, strict=True):
        errors = [part["seconds"] - part["low"], part["high"] - part["seconds"]]
        axis.barh(part["variant"], part["seconds"], xerr=errors, color=colours[0],
                  error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.3"})
        for place, (high, share) in enumerate(zip(part["high"], part["share"], strict=True)):
            axis.annotate(f"{share:.0f} %", (high, place), xytext=(5, 0), textcoords="offset points", va="center",
                          fontsize=9)
        axis.axvline(part["max"].iloc[0], color=colours[2], linestyle="--", label="max(compute, communicate)")
        axis.axvline(part["sum"].iloc[0], color=colours[3], linestyle=":", linewidth=2, label="compute + communicate")
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set(xlabel="seconds a step", title=f"{workers} workers", xlim=(0, None))
        axis.margins(x=0.14)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def links(frame: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Speed over the fastest DDP as it comes against the link's bandwidth, with 95 % intervals; a panel a number of
    workers.

    Args:
        frame: `analysis.by_link`.
        variants: to show.
    """
    groups = list(frame.groupby("workers"))
    figure, axes = figures.canvas(len(groups), width=5.6, height=4.0)
    colours = sns.color_palette("colorblind")
    shown = [variant for variant in variants if variant in set(frame["variant"])]
    given = sorted(frame["Mbit/s"].unique(), key=lambda each: each or float("inf"))
    for axis, (workers, part) in zip(axes[0], groups, strict=True):
        for number, (variant, colour) in enumerate(zip(shown, colours, strict=False)):
            rows = part[part["variant"] == variant].set_index("Mbit/s").loc[given]
            at = [place + 0.06 * (number - (len(shown) - 1) / 2) for place in range(len(given))]
            below, above = rows["over DDP"] - rows["low over DDP"], rows["high over DDP"] - rows["over DDP"]
            axis.errorbar(at, rows["over DDP"], [below.clip(0), above.clip(0)], marker="o", capsize=3, color=colour,
                          label=variant)
        axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(given)), [f"{each:g}" if each else "as it is" for each in given])
        axis.set(xlabel="link [Mbit/s]", title=f"{workers} workers")
    axes[0][0].set_ylabel("speed, the fastest DDP as it comes = 1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))
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
    colours = dict(zip(short, sns.color_palette("husl", len(short)), strict=True))
    figure, axes = figures.canvas(rows=len(spans), width=12.0, height=1.9)
    longest = max(frame["end"].max() for frame in spans.values())
    for axis, (title, frame) in zip(axes[:, 0], spans.items(), strict=True):
        for row in frame.itertuples():
            name = str(row.what).rpartition(".")[2]
            hatch = "////" if row.kind == "backward" else None
            axis.barh(lanes[row.kind], row.end - row.start, left=row.start, height=0.82, hatch=hatch, linewidth=0.3,
                      color=colours.get(name.partition("–")[0], "0.7"), edgecolor="white")
        axis.set_yticks([0, 1, 2], ["update", "communication", "compute"])
        axis.set(title=title, xlim=(0, 1.01 * longest))
        axis.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("seconds")
    handles = [Patch(color=colours[name], label=name) for name in short]
    handles += [Patch(facecolor="0.8", label="forward"), Patch(facecolor="0.8", hatch="////", edgecolor="white",
                                                               label="backward")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), title="layer (of a bucket: "
                  "its first in the order of the forward pass)", title_fontsize=9, fontsize=9)
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
    figure, axes = figures.canvas(3, width=5.0, height=4.2)
    speed, gain, link = axes[0]
    variants = list(dict.fromkeys(frame["variant"]))
    colours = dict(zip(variants, sns.color_palette("colorblind", len(variants)), strict=True))
    styles = {"ring": "-", "tree": "--"}
    for (variant, algorithm), part in frame.groupby(["variant", "algorithm"], sort=False):
        speed.plot(part["workers"], part["speed"], styles[algorithm], color=colours[variant],
                   label=f"{variant}, {algorithm}")
        band = {"color": colours[variant], "alpha": 0.15 if algorithm == "ring" else 0.0}
        speed.fill_between(part["workers"], part["speed low"], part["speed high"], **band)
        if variant != variants[0]:
            gain.plot(part["workers"], part["gain"], styles[algorithm], color=colours[variant])
            gain.fill_between(part["workers"], part["gain low"], part["gain high"], **band)
    numbers = sorted(set(frame["workers"]))
    speed.plot(numbers, numbers, color="0.6", linewidth=0.9, label="ideal")
    published = {variants[0]: announced["speed"] / (1 + announced["more than without [%]"] / 100),
                 variants[-1]: announced["speed"]}
    for variant, points in published.items():
        speed.plot(points.index, points, "o", markersize=6, markerfacecolor="white", color=colours[variant],
                   label=f"{variant}, announced (AlexNet, 2016)")
    speed.set(xscale="log", yscale="log", xlabel="GPUs (workers)", ylabel="learning speed, one = 1")
    gain.plot([at], [claimed], "k*", markersize=11, label=f"claimed: {claimed:g}× at {at}")
    gain.set(xscale="log", xlabel="GPUs (workers)", ylabel=f"gain over {variants[0]}")
    gain.set_ylim(None, 2.3)
    gain.legend(loc="upper left", fontsize=9)
    link.plot(sweep["ratio"], sweep["limit"], color="0.6", linewidth=0.9, label="limit")
    link.plot(sweep["ratio"], sweep["gain"], color=colours[variants[-1]], label=variants[-1])
    link.axhline(claimed, color="k", linewidth=0.9, linestyle=":", label=f"claimed: {claimed:g}×")
    link.set(xlabel="communicate / compute, by the link's bandwidth", ylabel=f"gain at {at} workers, ring",
             ylim=(None, 2.3))
    link.set_xscale("log", base=4)
    link.legend(loc="upper left", ncols=3, fontsize=8, columnspacing=1.0)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (speed, gain):
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter(plain)
    speed.set_yscale("log", base=4)
    speed.yaxis.set_major_formatter(plain)
    link.xaxis.set_major_formatter(plain)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
