"""An empty figure in the theme of all our plots, its legend below it, and its picture."""

from __future__ import annotations

import io
import struct
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

# Inches of a figure of two panels, so that letters stay readable in the column of a README, which is about 850 pixels.
WIDEST = 10.4
# Inches of two rows of a legend.
_ROWS = 0.5


def _theme() -> None:
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={
        "axes.grid": True, "grid.alpha": 0.35, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "font.size": 10, "lines.linewidth": 1.6,
        # Every tick says its number whole: no factor and no difference apart.
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-5, 7),
    })


def canvas(
    columns: int = 1, rows: int = 1, width: float = 6.0, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure in the theme of all our plots, and its axes.

    Args:
        columns, rows: of panels.
        width, height: of a panel, in inches. The figure gets no wider than `WIDEST`; its panels get narrower.
        options: of `matplotlib.pyplot.subplots`.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    _theme()
    size = (min(WIDEST, width * columns), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return figure, axes


def panels(
    count: int, columns: int = 2, width: float = 5.2, height: float = 3.4, **options: Any
) -> tuple[Figure, list[Any]]:
    """An empty figure of so many panels in rows, and their axes.

    Args:
        count: of panels.
        columns: of panels in a row, at most.
        width, height, options: as `canvas` has them.
    """
    columns = max(1, min(columns, count))
    # One panel alone takes the width of its legend.
    width = max(width, 6.4) if count == 1 else width
    figure, axes = canvas(columns, -(-count // columns), width, height, **options)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    # An axis above an empty place is the last of its column, and shows what shared axes show at the bottom alone.
    for axis in flat[max(0, count - columns):count]:
        axis.tick_params(axis="x", labelbottom=True)
    return figure, flat[:count]


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """A legend below all panels, where it covers nothing, in as many columns as the figure's width takes.

    The figure grows by its rows behind the second, so that the panels keep their height.
    """
    if not labels:
        return
    room = figure.bbox.width * 0.98
    for columns in range(min(len(labels), 6), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4, **options)
        box = legend.get_window_extent()
        if columns == 1 or box.width <= room:
            break
        legend.remove()
    more = box.height / figure.dpi - _ROWS
    if more > 0:
        figure.set_figheight(figure.get_figheight() + more)


def wrapped(text: str, inches: float, size: float = 12.0) -> str:
    """A text in lines of so many inches, in letters of so many points."""
    letters = int(inches * 72 / (0.56 * size))
    return "\n".join(textwrap.wrap(text, max(8, letters), break_long_words=False)) or text


def entitle(axis: Any, text: str) -> None:
    """Give a panel a title no wider than the panel."""
    figure = axis.get_figure()
    columns = axis.get_gridspec().ncols if axis.get_gridspec() else 1
    axis.set_title(wrapped(text, 0.86 * figure.get_figwidth() / columns))


def png(figure: Figure, resolution: float = 100) -> bytes:
    """A figure as a PNG of so many pixels an inch; the figure is closed, so that no backend shows it a second time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=resolution, bbox_inches="tight")
    plt.close(figure)
    return stream.getvalue()


def picture(content: bytes) -> str:
    """A PNG as an HTML element."""
    import base64

    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" style="max-width: 100%">'


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
