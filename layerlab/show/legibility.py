"""Whether a figure can be read: labels that overlap, repeat, are cut or lie, and curves that differ by colour alone."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from layerlab.base.errors import LayerlabError

# The width of a README's column, and the height of the smallest letters there, in pixels.
COLUMN, SMALLEST = 850, 8
# Pixels an inch of the pictures that are kept.
_RESOLUTION = 144
# Pixels (at the figure's own resolution) by which boxes may touch: letters are smaller than their boxes.
_TOUCH = 1.5
# Times the length of its axis that a label may have.
_LONGER = 1.1
_LETTERS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "µ": 1e-6, "n": 1e-9, "": 1.0}
_NUMBER = re.compile(r"(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(%|[kMGTmµn]?)")
_POWER = re.compile(r"(?:(-?[\d.]+)\\times)?(-?\d+)\^\{(-?\d+)\}")


def check_figure(figure: Figure) -> list[str]:
    """What makes a figure hard to read, a sentence each; the figure is drawn, and stays as it is.

    Args:
        figure: any of matplotlib's.

    Returns:
        Of its texts, which overlap each other or are crossed by a line, which are cut, which would be too small in a
        column of 850 pixels; of its axes, which have two ticks with one label, a label that is not its tick's value, a
        factor apart from the numbers, no label, or one that is longer than the axis; curves of one panel that differ
        by colour alone; and entries of a legend that look the same.

    Example:
        >>> from layerlab import figures
        >>> figure, ((axis,),) = figures.canvas()
        >>> _ = axis.plot([1, 2], [0.5, 0.6])
        >>> _ = axis.set(xlabel="epoch")
        >>> check_figure(figure)
        ['The y axis of panel 1 has no label.']
    """
    figure.canvas.draw()
    faults = [*_overlaps(figure), *_cut(figure), *_small(figure), *_same_in_legend(figure)]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    for number, axes in enumerate(panels, 1):
        faults += _crossed(axes, number)
        faults += _alike(axes, number)
        for axis in (axes.xaxis, axes.yaxis):
            where = f"the {axis.axis_name} axis of panel {number}"
            faults += [*_ticks(axis, where), *_long(axes, axis, where)]
            if _lacks_label(axes, axis, panels):
                faults.append(f"The {axis.axis_name} axis of panel {number} has no label.")
    return list(dict.fromkeys(faults))


def demand_legible(name: str, figure: Figure) -> None:
    """Refuse a figure in which something cannot be read.

    Raises:
        LayerlabError: what `check_figure` finds.
    """
    if faults := check_figure(figure):
        raise LayerlabError(f"The figure {name!r} cannot be read: {' '.join(faults)}")


def _texts(figure: Figure) -> list[Text]:
    """Every text that is drawn."""
    labels: set[int] = set()
    drawn: list[Any] = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [*axis.majorTicks, *axis.minorTicks]
            labels |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
            if axes.get_visible() and axis.get_visible():
                drawn += [label for tick in _in_view(axis) for label in (tick.label1, tick.label2)]
    hidden = [axes for axes in figure.axes if not axes.get_visible()]
    others = [text for text in figure.findobj(Text) if id(text) not in labels and text.axes not in hidden]
    return [text for text in (*drawn, *others) if text.get_visible() and text.get_text().strip()]


def _in_view(axis: Any) -> list[Any]:
    """The ticks of an axis that are drawn: matplotlib keeps others for later, and some beyond the ends."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    return [tick for tick in _shown(axis) if low - slack <= tick.get_loc() <= high + slack]


def _shown(axis: Any) -> list[Any]:
    """The ticks of an axis, without those that matplotlib keeps for later."""
    return [*axis.get_major_ticks(len(axis.get_majorticklocs())), *axis.get_minor_ticks(len(axis.get_minorticklocs()))]


def _box(text: Text) -> Bbox:
    box = text.get_window_extent()
    return Bbox.from_extents(box.x0 + _TOUCH, box.y0 + _TOUCH, box.x1 - _TOUCH, box.y1 - _TOUCH)


def _slanted(text: Text) -> bool:
    return bool(text.get_rotation() % 90)


def _meet(one: Bbox, other: Bbox) -> bool:
    return bool(one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1)


def _overlaps(figure: Figure) -> Iterator[str]:
    texts = [(text, _box(text)) for text in _texts(figure)]
    for (one, first), (other, second) in itertools.combinations(texts, 2):
        if not _meet(first, second):
            continue
        # Boxes of slanted texts beside each other meet where the texts do not; their lines have to.
        if _slanted(one) and one.get_rotation() == other.get_rotation():
            across = abs((first.x1 - second.x1) * math.sin(math.radians(one.get_rotation())))
            if across >= float(one.get_fontsize()) * figure.dpi / 72:
                continue
        yield f"{one.get_text()!r} and {other.get_text()!r} overlap."


def _cut(figure: Figure) -> Iterator[str]:
    whole = figure.bbox
    for text in _texts(figure):
        box = _box(text)
        clip = text.get_clip_box() if text.get_clip_on() else None
        for edge in (whole, *([clip] if clip is not None else [])):
            if box.x0 < edge.x0 - 1 or box.y0 < edge.y0 - 1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1:
                yield f"{text.get_text()!r} is cut by the edge."
                break


def _small(figure: Figure) -> Iterator[str]:
    shrunk = min(1.0, COLUMN / (figure.get_figwidth() * _RESOLUTION))
    for text in _texts(figure):
        size = float(text.get_fontsize()) / 72 * _RESOLUTION * shrunk
        if size < SMALLEST:
            yield f"{text.get_text()!r} is {size:.1f} pixels high in a column of {COLUMN}; {SMALLEST} can be read."


def _crossed(axes: Any, number: int) -> Iterator[str]:
    """Texts in a panel that a curve or a line crosses, and a legend that covers one."""
    boxes = [(f"{text.get_text()!r}", _box(text)) for text in axes.texts if text.get_visible() and text.get_text()]
    legend = axes.get_legend()
    if legend is not None and legend.get_visible():
        boxes.append(("the legend", legend.get_window_extent()))
    for line in axes.lines:
        if not line.get_visible() or line.get_linestyle() in ("None", "", " "):
            continue
        path = line.get_transform().transform_path(line.get_path())
        if len(path.vertices) < 2:
            continue
        for name, box in boxes:
            # What the panel cuts off crosses nothing.
            inside = Bbox.intersection(box, axes.bbox)
            if inside is not None and path.intersects_bbox(inside, filled=False):
                yield f"A line crosses {name} in panel {number}."


def _alike(axes: Any, number: int) -> Iterator[str]:
    """Curves with a name that differ by colour alone."""
    named = [(str(line.get_label()), line) for line in axes.lines]
    # The name of a curve with bars is its container's.
    named += [(str(each.get_label()), each[0]) for each in axes.containers if isinstance(each, ErrorbarContainer)]
    curves = [(name, line) for name, line in named
              if line is not None and line.get_visible() and not name.startswith("_") and len(line.get_xydata()) > 2]
    for (one, first), (other, second) in itertools.combinations(curves, 2):
        if _style(first) == _style(second):
            yield f"{one!r} and {other!r} differ by colour alone in panel {number}."


def _style(line: Line2D) -> tuple[str, str, str]:
    # matplotlib knows dashes of one's own by their pattern alone.
    return str(line.get_linestyle()), str(line.get_marker()), str(getattr(line, "_unscaled_dash_pattern", ""))


def _same_in_legend(figure: Figure) -> Iterator[str]:
    """Entries of a legend that look the same."""
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        if legend is None:
            continue
        entries = [(text.get_text(), _appearance(handle))
                   for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)]
        for (one, first), (other, second) in itertools.combinations(entries, 2):
            if first and first == second:
                yield f"{one!r} and {other!r} look the same in the legend."


def _appearance(handle: Any) -> tuple[Any, ...]:
    if isinstance(handle, Line2D):
        return (*_style(handle), handle.get_fillstyle(), str(handle.get_color()))
    if isinstance(handle, Patch):
        return (handle.get_facecolor(), handle.get_edgecolor(), handle.get_hatch())
    return ()


def _ticks(axis: Any, where: str) -> Iterator[str]:
    if not axis.get_visible():
        return
    if offset := axis.get_offset_text().get_text():
        yield f"{offset!r} stands apart from the numbers of {where}."
    shown = [(tick.get_loc(), tick.label1.get_text().strip()) for tick in _in_view(axis)]
    shown = [(place, text) for place, text in shown if text]
    texts = [text for _, text in shown]
    for text in dict.fromkeys(texts):
        if texts.count(text) > 1:
            yield f"{text!r} stands at {texts.count(text)} ticks of {where}."
    if not _is_number_axis(axis):
        return
    steps = [after - before for before, after in itertools.pairwise(sorted(place for place, _ in shown))]
    for place, text in shown:
        number = _said(text)
        if number is None:
            continue
        allowed = 1e-3 * min([abs(place) or 1.0, *(step for step in steps if step > 0)])
        # Per cent stand for shares, or for themselves.
        meant = [number, number / 100] if text.endswith("%") else [number]
        if all(abs(each - place) > allowed for each in meant):
            yield f"{text!r} stands at {place:.6g} of {where}."


def _long(axes: Any, axis: Any, where: str) -> Iterator[str]:
    """An axis' label that is longer than the axis by a tenth or more, and so stands beside others' as well."""
    side = "width" if axis.axis_name == "x" else "height"
    if axis.get_visible() and axis.label.get_visible() and axis.label.get_text():
        box, room = axis.label.get_window_extent(), getattr(axes.bbox, side)
        if getattr(box, side) > _LONGER * room:
            yield f"{axis.label.get_text()!r} is longer than {where}."


def _is_number_axis(axis: Any) -> bool:
    """Whether places are numbers, and not those of names in a row, which somebody put there with their ticks."""
    formatter = axis.get_major_formatter()
    # Names given with their places come from such a function.
    named = isinstance(formatter, FuncFormatter) and isinstance(formatter.func, functools.partial)
    return not named and not isinstance(formatter, FixedFormatter | NullFormatter) and not axis.have_units()


def _said(text: str) -> float | None:
    """The number that a label says; None where it says none."""
    plain = text.replace("−", "-").replace(r"\mathdefault", "").strip("${} ")
    if power := _POWER.search(text.replace("−", "-").replace(r"\mathdefault", "")):
        mantissa, base, exponent = power.groups()
        return float(mantissa or 1) * float(base) ** float(exponent)
    found = _NUMBER.fullmatch(plain)
    if found is None:
        return None
    number, unit = found.groups()
    return float(number.replace(",", "")) * _LETTERS.get(unit, 1.0)


def _lacks_label(axes: Any, axis: Any, panels: Sequence[Any]) -> bool:
    if not axis.get_visible() or axis.get_label_text().strip() or not _is_number_axis(axis):
        return False
    if not any(tick.label1.get_visible() and tick.label1.get_text() for tick in _shown(axis)):
        return False
    # One label may stand for all panels of a row or column with the same axis.
    name = axis.axis_name
    group = getattr(axes, f"get_shared_{name}_axes")().get_siblings(axes)
    figure_label = getattr(axes.get_figure(), f"_sup{name}label", None)
    return figure_label is None and not any(
        getattr(each, f"{name}axis").get_label_text().strip() for each in group if each in panels)
