"""The figure of all methods: accuracy against cost, each beside plain training of the same cost and its placebo."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from layerlab.show.canvas import canvas
from layerlab.show.looks import TONES

# A panel each, in this order; what is neither has the third one.
PANELS = {"time": "training time", "compute": "compute of the training"}
OTHER = "memory, storage or time for inference"
# What is said behind a method's name in the third panel.
_SAYS = {"memory": "peak memory", "size": "storage", "inference": "time for inference"}
_SHAPES = "osv"
# Points of the page by which a companion stands beside its method, which costs the same.
_BESIDE = (0.0, 7.0, -7.0)
# Letters in a line of a method's name at the right of its panel; the height of such a line, and the room between two
# names, as shares of the height of a panel that its names leave as it is.
_LETTERS, _LINE, _APART = 22, 0.066, 0.03
HOW = (
    "A method pays where its point lies above the\nsquare: plain training that costs as much.\n"
    "Bars are 95 % intervals; those of squares and\ntriangles are of the difference to the method."
)
NOTHING = "No method was measured with today's code."


def overview(points: pd.DataFrame, kinds: Sequence[str], note: str = "") -> Figure:
    """What methods gain in accuracy against what they cost, a panel for each kind of cost.

    Args:
        points: a row a point, with columns `method`, `tone` (which colour of `TONES` the method has), `cost`, `kind`
            (of `kinds`), `x` (the cost as a share of what it is without the method), `y` (points of accuracy above
            that, NaN where it was not compared), and half-widths of intervals as `x ±` and `y ±`, NaN where there is
            none.
        kinds: the method itself, plain training of the same cost, the placebo.
        note: a line above.
    """
    named = points["cost"].map(PANELS).fillna(OTHER)
    titles = [title for title in (*PANELS.values(), OTHER) if (named == title).any()]
    if not titles:
        return _empty(note)
    # What points and lines are stands in the cell that is left, or in a row below.
    parts, odd = [points[named == title] for title in titles], len(titles) % 2
    # A row is as high as the names beside its panels.
    rooms = [sum(map(_room, _names(part))) for part in parts]
    heights = [max(1.0, *rooms[first:first + 2]) for first in range(0, len(rooms), 2)] + ([] if odd else [0.45])
    figure, axes = canvas(2, len(heights), width=4.7, height=3.5 * sum(heights) / len(heights), height_ratios=heights)
    cells = list(axes.flat)
    for number, (title, part) in enumerate(zip(titles, parts, strict=True)):
        _panel(cells[number], title, part, kinds)
        _name(cells[number], part, heights[number // 2])
    for axis in cells[len(titles):]:
        axis.set_axis_off()
    _key(cells[len(titles)], kinds, bool(points.loc[points["kind"] == kinds[0], "y"].isna().any()))
    cells[-1].text(0, 0.38 if odd else 0.92, HOW, transform=cells[-1].transAxes, va="top", fontsize=9.5)
    if note:
        figure.suptitle(note, fontsize=11)
    return figure


def _empty(note: str) -> Figure:
    figure, ((axis,),) = canvas(width=9.4, height=1.2)
    axis.set_axis_off()
    axis.text(0.5, 0.5, note or NOTHING, ha="center", va="center", transform=axis.transAxes)
    return figure


def _panel(axis: Any, title: str, points: pd.DataFrame, kinds: Sequence[str]) -> None:
    axis.axhline(0, color="0.55", linestyle="--", linewidth=0.9, zorder=0)
    axis.axvline(1, color="0.55", linestyle="--", linewidth=0.9, zorder=0)
    axis.plot([1], [0], "*", color="0.25", markersize=12, zorder=1)
    for _, part in _methods(points):
        # Where accuracy was not compared, there is nothing that a companion could stand above or below.
        for _, point in part.iloc[:1 if math.isnan(part["y"].iloc[0]) else None].iterrows():
            _point(axis, point, kinds.index(point["kind"]), _colour(part))
    axis.set_title(title, fontsize=11)
    axis.set(xlabel="share of what it is\nwithout the method", ylabel="points of accuracy gained")
    axis.margins(x=0.22, y=0.28)
    low, high = axis.get_xlim()
    axis.set_xlim(max(0.0, min(low, 0.8)), max(high, 1.12))
    bottom, top = axis.get_ylim()
    axis.set_ylim(min(bottom, -0.6), max(top, 0.6))
    for x, y, side, text in ((0.02, 0.98, "left", "better: costs less,\nmore accurate"),
                             (0.98, 0.02, "right", "worse: costs more,\nless accurate")):
        axis.text(x, y, text, transform=axis.transAxes, ha=side, va="top" if y > 0.5 else "bottom", fontsize=8,
                  style="italic", color="0.45",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def _methods(points: pd.DataFrame) -> Any:
    """(method, cost) with the points of each: its own, then those of its companions."""
    return points.groupby(["method", "cost"], sort=False)


def _colour(part: pd.DataFrame) -> str:
    return TONES[int(part["tone"].iloc[0]) % len(TONES)]


def _names(points: pd.DataFrame) -> list[str]:
    """What stands beside a panel, a text for each of `_methods`, in lines."""
    texts = [str(method) if cost in PANELS else f"{method}: {_SAYS[cost]}" for (method, cost), _ in _methods(points)]
    return [textwrap.fill(text, _LETTERS, break_on_hyphens=False) for text in texts]


def _room(text: str) -> float:
    """What a name takes of the height of a panel that its names leave as it is."""
    return _LINE * (text.count("\n") + 1) + _APART


def _name(axis: Any, points: pd.DataFrame, height: float) -> None:
    """Write the names at the right of a panel, one below the other in the points' order, with a line from each to its
    point: where nothing else stands, nothing overlaps.

    Args:
        axis: the panel.
        points: its points.
        height: how many times as high it is as one that its names leave as it is.
    """
    texts = _names(points)
    owns = [(part.iloc[0], _colour(part)) for _, part in _methods(points)]
    # Where accuracy was not compared, the point stands at no difference.
    levels = [0.0 if math.isnan(own["y"]) else own["y"] for own, _ in owns]
    low, high = axis.get_ylim()
    places = _spaced([(y - low) / (high - low) for y in levels], [_room(text) / height for text in texts])
    for (own, colour), y, text, place in zip(owns, levels, texts, places, strict=True):
        axis.annotate(text, (own["x"], y), (1.04, place), textcoords="axes fraction", color=colour, fontsize=9,
                      va="center", fontweight="bold", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkB": 5,
                                  "relpos": (0, 0.5)})


def _spaced(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of boxes that keep the order of the wanted ones and do not meet, moved as little as that takes.

    Args:
        wanted: centres, as shares of the panel's height.
        heights: of the boxes.

    Example:
        >>> _spaced([0.5, 0.5], [0.2, 0.2])
        [0.4, 0.6]
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    # Blocks of boxes that touch: [the boxes, the block's middle]; two that meet become one around their mean.
    blocks: list[tuple[list[int], float]] = []
    for index in order:
        block, middle = [index], wanted[index]
        while blocks:
            before, other = blocks[-1]
            room = (sum(heights[each] for each in before) + sum(heights[each] for each in block)) / 2
            if middle - other >= room:
                break
            blocks.pop()
            middle = (other * len(before) + middle * len(block)) / (len(before) + len(block))
            block = before + block
        blocks.append((block, middle))
    places = [0.0] * len(wanted)
    for block, middle in blocks:
        half = sum(heights[each] for each in block) / 2
        # Within the panel, as far as there is room.
        edge = max(0.0, min(middle, 1 - half) - half)
        for each in block:
            places[each] = round(edge + heights[each] / 2, 6)
            edge += heights[each]
    return places


def _point(axis: Any, point: pd.Series, kind: int, colour: str) -> None:
    """One point with its intervals; a companion beside its method, not above it."""
    place = offset_copy(axis.transData, fig=axis.get_figure(), x=_BESIDE[kind], units="points")
    compared = not math.isnan(point["y"])
    shape = _SHAPES[kind] if compared else "D"
    bars = {f"{name}err": None if math.isnan(point[f"{name} ±"]) else point[f"{name} ±"] for name in "xy"}
    if not compared:
        bars["yerr"] = None
    axis.errorbar(point["x"], point["y"] if compared else 0.0, fmt=shape, color=colour, transform=place, markersize=8,
                  elinewidth=1.0, capsize=2.5, alpha=0.75 if kind else 1.0, zorder=3 if kind else 4,
                  markerfacecolor=colour if kind == 0 and compared else "white", **bars)
    # What is drawn beside its place does not stretch the axes by itself.
    y = point["y"] if compared else 0.0
    axis.update_datalim([(point["x"] + sign * (bars["xerr"] or 0.0), y + sign * (bars["yerr"] or 0.0))
                         for sign in (-1, 1)])
    axis.autoscale_view()


def _key(axis: Any, kinds: Sequence[str], uncompared: bool) -> None:
    """What the points are, in a place of their own; `uncompared`: a method's accuracy was not compared."""
    dot: dict[str, Any] = {"color": "0.3", "linestyle": "", "markersize": 8}
    method, *others = kinds
    handles = [plt.Line2D([], [], marker="o", **dot)]
    handles += [plt.Line2D([], [], marker=shape, markerfacecolor="white", **dot) for shape in _SHAPES[1:len(kinds)]]
    handles += [plt.Line2D([], [], marker="*", **{**dot, "markersize": 12})]
    names = [f"the {method}", *others, "training without the method"]
    if uncompared:
        handles.insert(1, plt.Line2D([], [], marker="D", markerfacecolor="white", **dot))
        names.insert(1, f"the {method}, accuracy not compared")
    axis.legend(handles, names, loc="upper left", fontsize=10, title="Each colour is a method", alignment="left",
                title_fontproperties={"weight": "bold"})
