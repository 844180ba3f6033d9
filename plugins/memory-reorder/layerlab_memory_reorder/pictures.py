"""The paper's Figures 3 and 4: what lies where in memory, and when; savings, peaks and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from layerlab import figures
from layerlab_memory_reorder.analysis import PLAN
from layerlab_memory_reorder.method.measuring import (
    BOTH,
    CHECKPOINTING,
    FUSED,
    NULL,
    OURS,
    PAPER,
    PARTS,
    PLAIN,
    USERS,
)
from layerlab_memory_reorder.method.plan import Plan

KINDS = ("weights", "weight diff", "data", "diff", "mask", "optimizer state")

figures.bind(plain=[PLAIN, "plain PyTorch", PLAN], method=[OURS, "reordered"],
             others=[FUSED, BOTH, CHECKPOINTING, PAPER, USERS, NULL])


def lifetimes(plans: Mapping[str, Plan], unit: float = 1e6, label: str = "memory [MB]") -> Figure:
    """One panel a plan: operations in order on the x axis, places in memory on the y axis, a box a tensor.

    Args:
        plans: title → plan; all panels have the same y axis.
        unit, label: of the y axis, in bytes.
    """
    colours = dict(zip(KINDS, figures.tones(len(KINDS)), strict=True))
    figure, axes = figures.panels(len(plans), height=5.6, sharey=True)
    tallest = max(plan.total for plan in plans.values())
    for axis, (title, plan) in zip(axes, plans.items(), strict=True):
        for block in plan.blocks:
            width, height = block.last - block.first + 1, block.bytes / unit
            axis.add_patch(Rectangle((block.first - 0.5, block.offset / unit), width, height, linewidth=0.6,
                                     facecolor=colours[block.kind], edgecolor="white", alpha=0.75))
            # Named where its name fits.
            if block.bytes > 0.035 * tallest and len(block.tensor) * 0.36 < width:
                axis.text(block.first - 0.5 + width / 2, block.offset / unit + height / 2, block.tensor, fontsize=8,
                          ha="center", va="center", color="black")
        axis.axhline(plan.total / unit, color="0.3", linewidth=0.9, linestyle="--")
        axis.set_title(f"{title}: {plan.total / unit:.3g} MB")
        axis.set_xlim(-0.6, len(plan.operations) - 0.4)
        axis.set_ylim(0, 1.06 * tallest / unit)
        names = [operation.name.removeprefix("forward ") for operation in plan.operations]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
        axis.set_xlabel("operations, in their order")
        axis.grid(False)
    axes[0].set_ylabel(label)
    present = [kind for kind in KINDS if any(block.kind == kind for plan in plans.values() for block in plan.blocks)]
    figures.legend_below(figure, [Patch(color=colours[kind], alpha=0.75) for kind in present], present)
    return figure


def savings_over_batch(frame: pd.DataFrame, published: float) -> Figure:
    """Planned savings over the batch size, a panel a network, the published number as a line.

    Args:
        frame: `analysis.planned_savings`.
        published: per cent.
    """
    names = list(dict.fromkeys(frame["network"]))
    figure, axes = figures.panels(len(names), columns=4 if len(names) > 4 else 2, height=2.9, sharey=True)
    lines = {"kept": "all weight diffs kept", "shared": "one weight diff at a time", "slabs": "weight diffs in slabs",
             "forward reuse": "memory reused in forward too"}
    for axis, name in zip(axes, names, strict=True):
        part = frame[frame["network"] == name]
        for column, label in lines.items():
            look = figures.look(label)
            axis.plot(part["batch"], part[column], marker=look.marker, markersize=5, color=look.colour,
                      linestyle=look.line, label=label)
        axis.axhline(published, color="0.3", linewidth=0.9, linestyle="--",
                     label=f"published: over {published:g} % against the conventional plan")
        axis.set(xlabel="batch size", ylim=(0, max(75, 1.08 * frame[list(lines)].max().max())))
        figures.entitle(axis, name)
        figures.ticks.logarithmic(axis.xaxis, base=2)
        figures.ticks.at(axis.xaxis, sorted(set(part["batch"])))
        axis.set_ylabel("saved [%]" if axis.get_subplotspec().is_first_col() else "")
    figures.legend_below(figure, *axes[0].get_legend_handles_labels(), handlelength=3)
    return figure


def peak_bars(frame: pd.DataFrame) -> Figure:
    """Peaks of a step, one panel for each network and batch; the title says whether steps were real or dry runs.

    Args:
        frame: `analysis.ways` or `analysis.parts`; parts of this project's own have the method's colour.
    """
    groups, figure, axes, arms = _panels(frame)
    for axis, ((network, batch), part) in zip(axes, groups, strict=True):
        rows = part.set_index("arm").reindex(arms)
        bars = axis.barh(range(len(arms)), rows["peak GB"], color=[_colour(arm) for arm in arms])
        # A way that some network cannot take has no number there.
        numbers = ["" if pd.isna(peak) else f"{peak:.3g}" for peak in rows["peak GB"]]
        axis.bar_label(bars, numbers, fontsize=9, padding=2)
        kind = "real steps" if part["real"].any() else "dry runs"
        axis.set_title(f"{network}\nbatch {batch}, {kind}", fontsize=11)
        axis.set_xlabel("peak [GB]")
        # Numbers stand behind the bars.
        axis.margins(x=0.3)
        axis.xaxis.set_major_locator(figures.ticks.few(4))
    return figure


def times(frame: pd.DataFrame) -> Figure:
    """Seconds of a step of every way, each a multiple of that of PyTorch's optimizer in backward, with quartiles.

    Args:
        frame: `analysis.timed`.
    """
    groups, figure, axes, arms = _panels(frame)
    for axis, ((network, batch), part) in zip(axes, groups, strict=True):
        rows = part.set_index("arm").reindex(arms)
        axis.axvline(1, color="0.3", linestyle="--", linewidth=1)
        for arm, row in rows.dropna(subset="time").iterrows():
            place = arms.index(str(arm))
            axis.plot([row["time low"], row["time high"]], [place, place], color=_colour(arm), linewidth=2)
            axis.plot(row["time"], place, "o", color=_colour(arm), markersize=6)
            axis.text(0.95, place, f"{row['time']:.2f}", transform=axis.get_yaxis_transform(), fontsize=9, ha="right",
                      va="center")
        axis.set_title(f"{network}\nbatch {batch}", fontsize=11)
        axis.set_xlabel("seconds of a step, ×")
        # Numbers stand behind the longest interval.
        low, high = frame["time low"].min(), frame["time high"].max()
        axis.set_xlim(low - 0.05 * (high - low), high + 0.25 * (high - low))
        axis.xaxis.set_major_locator(figures.ticks.few(4))
    figure.suptitle(f"Seconds of a step as a multiple of those of {FUSED}, with quartiles")
    return figure


def _panels(frame: pd.DataFrame) -> tuple[list[Any], Figure, Any, list[str]]:
    """Networks and batches with their rows, a panel for each, and the arms: rows of a panel, the first at the top."""
    groups = list(frame.groupby(["network", "batch"], sort=False))
    arms = list(dict.fromkeys(frame["arm"]))
    figure, axes = figures.panels(len(groups), columns=3, width=3.6, height=0.26 * len(arms) + 1.2, sharey=True)
    for axis in axes:
        axis.set_yticks(range(len(arms)), arms, fontsize=9)
        axis.tick_params(axis="y", left=axis.get_subplotspec().is_first_col())
        axis.grid(axis="y", visible=False)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return groups, figure, axes, arms


def _colour(arm: Any) -> str:
    """The arm's own; all parts but the paper's are this project's, as the method with all of them is."""
    return figures.look(OURS if arm in list(PARTS)[1:] else str(arm)).colour
