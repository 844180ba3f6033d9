"""The figures of the notebook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from layerlab import FitResult, figures
from layerlab_low_bit.analysis import KINDS, STEERINGS
from layerlab_low_bit.strategy import LowBit

figures.bind(plain=["float32"], method=["8 bits", next(iter(STEERINGS))], others=["16 bits", *list(STEERINGS)[1:]])

CHOSEN = "#d55e00"


def rates_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """Saturated and vanished shares of `steering_table`, one panel each, on logarithmic axes."""
    figure, axes = figures.panels(2, columns=1, width=10.4, height=3.2)
    arms = list(table["arm"])
    places, width = np.arange(len(KINDS)), 0.84 / len(arms)
    for axis, rate in zip(axes, ("saturated", "vanished"), strict=True):
        shares = table[[f"{rate}: {label} [ppm]" for label in KINDS.values()]].to_numpy()
        floor = 0.2 * min(shares[shares > 0], default=1.0)
        for number, arm in enumerate(arms):
            row = table[table["arm"] == arm].iloc[0]
            values = [row[f"{rate}: {label} [ppm]"] for label in KINDS.values()]
            shown = axis.bar(places + (number - (len(arms) - 1) / 2) * width, np.maximum(values, floor), width,
                             label=arm, color=figures.look(arm).colour)
            axis.bar_label(shown, [f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in values],
                           fontsize=8.5, rotation=90, padding=2)
        axis.set_yscale("log")
        # Above the bars is room for their upright numbers.
        highest = max(np.nanmax(shares, initial=0.0), 10 * floor)
        figures.ticks.logarithmic(axis.yaxis, letters=True)
        # There are no more than a million of a million.
        axis.set_yticks([place for place in axis.get_yticks() if place <= 1e6])
        # Last, since ticks widen the view, in which nothing would have a bar.
        axis.set_ylim(floor, highest * (highest / floor) ** 0.5)
        axis.set_xticks(places, KINDS.values())
        axis.set(ylabel=f"{rate} values [ppm]")
        axis.grid(axis="x", visible=False)
    axes[0].set_title("too large for the format")
    axes[1].set_title("below half of the lowest bit")
    figures.legend_below(figure, *axes[0].get_legend_handles_labels())
    figure.suptitle(title)
    return figure


def msb_map(result: FitResult, title: str = "") -> Figure:
    """The store as a picture: tensors × position of the most significant bit, and the format chosen for the next step.

    The tensors of the layer nearest the input are at the bottom.

    Args:
        result: of a fit with LowBit.
        title: of the figure.
    """
    (strategy,) = result.strategies
    assert isinstance(strategy, LowBit)
    frame = strategy.statistics
    frame = frame[(frame["epoch"] == frame["epoch"].max()) & frame["kind"].isin(KINDS)]
    # Of the parameters' gradients only the weights': biases and normalisations would fill the picture.
    frame = frame[(frame["kind"] != "gradient") | frame["tensor"].str.endswith(".weight.gradient")]
    frame = frame[frame["values"] > 0]
    tallest = int(frame["kind"].value_counts().max())
    figure, axes = figures.panels(len(KINDS), height=min(8.0, 1.6 + 0.2 * tallest))
    for axis, (kind, label) in zip(axes, KINDS.items(), strict=True):
        _draw_kind(axis, frame[frame["kind"] == kind], strategy.histograms)
        axis.set(title=label, xlabel="position of the most significant bit")
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.7, pad=0.01)
    bar.set_label("share of non-zero values")
    box = Rectangle((0, 0), 1, 1, fill=False, linewidth=1.6, edgecolor=CHOSEN)
    figures.legend_below(figure, [box], ["the bits of the format that is chosen for the next step"])
    figure.suptitle(title)
    return figure


def _draw_kind(axis: Any, part: pd.DataFrame, histograms: pd.DataFrame) -> None:
    # Errors come in the order of backward, which meets the output first.
    if (part["kind"] == "error").all():
        part = part.iloc[::-1]
    table = histograms.loc[part["tensor"]]
    shares = table.div(table.sum(axis=1).clip(lower=1), axis=0)
    used = shares.columns[(shares > 0).any()]
    first = max(used.min(), int((part["position"] - part["bits"]).min()) - 4)
    last = max(used.max(), int(part["position"].max())) + 1
    shares = shares.loc[:, first:last]
    axis.imshow(np.ma.masked_less_equal(shares.to_numpy(), 0), aspect="auto", cmap="viridis", origin="lower",
                norm=LogNorm(1e-6, 1), extent=(first - 0.5, last + 0.5, 0, len(part)))
    for row, (position, bits) in enumerate(zip(part["position"], part["bits"], strict=True)):
        axis.add_patch(Rectangle((position - bits + 1.5, row + 0.08), bits - 1, 0.84, fill=False, linewidth=1.6,
                                 edgecolor=CHOSEN))
    ends = (".weight.gradient", ".weight", ".error", ".input")
    names = [next((n.removesuffix(end) for end in ends if n.endswith(end)), n) for n in part["tensor"]]
    figures.name_rows(axis, [name.removeprefix("features.") for name in names])
    figures.ticks.whole(axis.xaxis, 7)
    axis.grid(False)


def positions_over_epochs(result: FitResult, kind: str) -> pd.DataFrame:
    """Tensors × epochs: the position chosen at each epoch's end, for the weights' layers."""
    table = result.layer_maps[f"low-bit: {kind} formats"].table
    return table.rename(index=lambda name: name.removesuffix(f".{kind}"))
