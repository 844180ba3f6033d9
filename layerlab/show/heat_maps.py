"""Layer × epoch heat maps; in all of them the layer nearest the input is at the bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from layerlab.show.canvas import entitle, legend_below, panels, wrapped
from layerlab.show.looks import tones

if TYPE_CHECKING:
    from layerlab.show.layer_map import LayerMap

# Inches between the names of layers, and between the numbers of epochs for each of their letters.
_LINE, _LETTER = 0.17, 0.1
# Inches from a map down to its own legend, below its epochs.
_LEGEND = 0.55
_EMPTY, _GONE = "#d9d9d9", "#c94c4c"


def layer_epoch_map(
    maps: Mapping[str, pd.DataFrame], label: str, states: Sequence[str] | None = None,
    edges: Mapping[str, Sequence[int]] | None = None, columns: str = "epoch", gone: str = "", edge: str = "",
) -> Figure:
    """Layer × epoch heat maps, the layer nearest the input at the bottom.

    Args:
        maps: title → table with layers as index (input first) and epochs as columns.
        label: what the colour means.
        states: for integer tables: the names of 0, 1, …; drawn as two or more flat colours with a legend.
        edges: title → for each epoch a number of layers, counted from the input, above which a line is drawn.
        columns: what the columns are.
        gone: what it means that a cell has no number, where that is to be seen: drawn red.
        edge: what the line says.
    """
    tallest = max(len(table) for table in maps.values())
    figure, axes = panels(len(maps), columns=2 if len(maps) < 5 or tallest > 20 else 3,
                          height=min(8.0, max(2.4, 0.2 * tallest + 1.1)))
    for axis, (title, table) in zip(axes, maps.items(), strict=True):
        _heat_map(axis, title, table, label, states, gone)
        axis.set_xlabel(columns)
        before = 0
        for column, count in enumerate(edges[title] if edges else ()):
            if count:
                axis.plot([column, column, column + 1], [before, count, count], color="crimson", linewidth=2,
                          solid_capstyle="butt", clip_on=False)
            before = count
    handles, names = _state_handles(states or ()), list(states or ())
    if gone and any(table.isna().to_numpy().any() for table in maps.values()):
        handles, names = [*handles, plt.Rectangle((0, 0), 1, 1, color=_GONE)], [*names, gone]
    if edge:
        handles, names = [*handles, plt.Line2D([], [], color="crimson", linewidth=2)], [*names, edge]
    legend_below(figure, handles, names)
    return figure


def layer_maps(maps: Mapping[str, LayerMap], title: str = "") -> Figure:
    """Layer × epoch maps of several quantities, each with colours of its own.

    Args:
        maps: `FitResult.layer_maps`.
    """
    tallest = max(len(each.table) for each in maps.values())
    figure, axes = panels(len(maps), height=min(8.0, max(2.6, 0.2 * tallest + 1.5)))
    for axis, (name, each) in zip(axes, maps.items(), strict=True):
        _heat_map(axis, name, each.table, each.label, each.states or None)
        if each.states:
            below = axis.transAxes + ScaledTranslation(0, -_LEGEND, figure.dpi_scale_trans)
            axis.legend(_state_handles(each.states), each.states, loc="upper center", bbox_to_anchor=(0.5, 0.0),
                        bbox_transform=below, ncols=min(3, len(each.states)))
    if title:
        figure.suptitle(title)
    return figure


def _state_colours(count: int) -> list[Any]:
    return [_EMPTY, *tones(count)][:count]


def _state_handles(states: Sequence[str]) -> list[Any]:
    return [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _state_colours(len(states))]


def _heat_map(
    axis: Any, title: str, table: pd.DataFrame, label: str, states: Sequence[str] | None, gone: str = ""
) -> None:
    options: dict[str, Any] = {"cmap": plt.get_cmap("viridis")}
    if states is not None:
        options = {"cmap": ListedColormap(_state_colours(len(states))), "vmin": -0.5, "vmax": len(states) - 0.5}
    if gone:
        axis.set_facecolor(_GONE)
    # Of a deep network, rows are thin, and lines between them would hide them.
    lines = {"edgecolors": "white", "linewidth": 0.5} if len(table) <= 40 else {}
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    drawn = axis.pcolormesh(cells, **options, **lines)
    if states is None:
        height = 0.65 * axis.get_figure().get_figheight() / axis.get_gridspec().nrows
        axis.get_figure().colorbar(drawn, ax=axis, label=wrapped(label, height), pad=0.02)
    entitle(axis, title)
    axis.set(xlabel="epoch", ylabel="")
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    name_columns(axis, [str(column) for column in table.columns])
    name_rows(axis, [str(name).removeprefix("features.") for name in table.index])


def name_rows(axis: Any, names: Sequence[str], size: float = 9.0) -> None:
    """Name the rows of a map from the bottom up, as many of them as there is room for."""
    rows = axis.get_gridspec().nrows
    room = 0.75 * axis.get_figure().get_figheight() / rows
    every = max(1, -(-len(names) // max(1, int(room / _LINE))))
    axis.set_yticks(np.arange(0, len(names), every) + 0.5, list(names)[::every], fontsize=size)


def name_columns(axis: Any, names: Sequence[str]) -> None:
    """Name the columns of a map, as many of them as there is room for."""
    columns = axis.get_gridspec().ncols
    room = 0.5 * axis.get_figure().get_figwidth() / columns
    longest = max(map(len, names), default=1) + 1
    every = max(1, -(-len(names) // max(1, int(room / (_LETTER * longest)))))
    axis.set_xticks(np.arange(0, len(names), every) + 0.5, list(names)[::every])
