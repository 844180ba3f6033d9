"""The paper's Figures 3 and 4: what lies where in memory, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from layerlab import figures
from layerlab_memory_reorder.method.plan import Plan

KINDS = ("weights", "weight diff", "data", "diff", "mask", "optimizer state")


def lifetimes(plans: Mapping[str, Plan], unit: float = 1e6, label: str = "memory [MB]") -> Figure:
    """One panel a plan: operations in order on the x axis, places in memory on the y axis, a box a tensor.

    Args:
        plans: title → plan; all panels have the same y axis.
        unit, label: of the y axis, in bytes.
    """
    colours: dict[str, Any] = dict(zip(KINDS, sns.color_palette("colorblind", len(KINDS)), strict=True))
    figure, axes = figures.canvas(len(plans), width=6.6, height=5.6, sharey=True)
    tallest = max(plan.total for plan in plans.values())
    for axis, (title, plan) in zip(axes[0], plans.items(), strict=True):
        for block in plan.blocks:
            width, height = block.last - block.first + 1, block.bytes / unit
            axis.add_patch(Rectangle((block.first - 0.5, block.offset / unit), width, height, linewidth=0.6,
                                     facecolor=colours[block.kind], edgecolor="white"))
            if block.bytes > 0.028 * tallest:
                axis.text(block.first - 0.5 + width / 2, block.offset / unit + height / 2, block.tensor, fontsize=6.5,
                          ha="center", va="center", color="black")
        axis.axhline(plan.total / unit, color="0.3", linewidth=0.9, linestyle="--")
        axis.set_title(f"{title}: {plan.total / unit:.3g} MB")
        axis.set_xlim(-0.6, len(plan.operations) - 0.4)
        axis.set_ylim(0, 1.06 * tallest / unit)
        names = [operation.name.removeprefix("forward ") for operation in plan.operations]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.grid(False)
    axes[0][0].set_ylabel(label)
    present = [kind for kind in KINDS if any(block.kind == kind for plan in plans.values() for block in plan.blocks)]
    figure.legend([Patch(color=colours[kind]) for kind in present], present, loc="outside lower center",
                  ncols=len(present))
    return figure


def savings_over_batch(frame: pd.DataFrame, published: float) -> Figure:
    """Planned savings over the batch size, a panel a network, the published number as a line.

    Args:
        frame: `analysis.planned_savings`.
        published: per cent.
    """
    names = list(dict.fromkeys(frame["network"]))
    figure, axes = figures.canvas(len(names), width=3.3, sharey=True)
    lines = {"kept": "all weight diffs kept", "shared": "one weight diff at a time", "slabs": "weight diffs in slabs",
             "forward reuse": "memory reused in forward too"}
    colours = sns.color_palette("colorblind", len(lines))
    for axis, name in zip(axes[0], names, strict=True):
        part = frame[frame["network"] == name]
        for colour, (column, label) in zip(colours, lines.items(), strict=True):
            axis.plot(part["batch"], part[column], marker="o", markersize=4, color=colour, label=label)
        axis.axhline(published, color="0.3", linewidth=0.9, linestyle="--",
                     label=f"published: over {published:g} % against the conventional plan")
        axis.set_xscale("log", base=2)
        axis.set_xticks(part["batch"], [str(batch) for batch in part["batch"]])
        axis.minorticks_off()
        axis.set(title=name, xlabel="batch size", ylim=(0, 75))
    axes[0][0].set_ylabel("saved [%]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def peak_bars(frame: pd.DataFrame) -> Figure:
    """Peaks of a step, one panel for each network and batch; the title says whether steps were real or dry runs.

    Args:
        frame: `analysis.peaks` or `analysis.parts`.
    """
    groups: list[Any] = list(frame.groupby(["network", "batch"], sort=False))
    arms = list(dict.fromkeys(frame["arm"]))
    colours = dict(zip(arms, sns.color_palette("colorblind", len(arms)), strict=True))
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = figures.canvas(columns, rows, width=3.1 + 2.2 / columns, height=2.9, sharey=True)
    flat = list(axes.flat)
    for axis, ((network, batch), part) in zip(flat, groups, strict=False):
        bars = axis.barh(range(len(part)), part["peak GB"], color=[colours[arm] for arm in part["arm"]])
        axis.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=2)
        axis.set_yticks(range(len(part)), part["arm"], fontsize=8)
        kind = "real steps" if part["real"].any() else "dry runs"
        axis.set(title=f"{network}, batch {batch}, {kind}", xlabel="peak [GB]")
        axis.margins(x=0.18)
        axis.grid(axis="y", visible=False)
    flat[0].invert_yaxis()
    for axis in flat[len(groups):]:
        axis.set_visible(False)
    return figure
