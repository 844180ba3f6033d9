"""How results show themselves: one formatter for a terminal (aligned text) and a notebook (HTML).

Numbers over seeds are mean ± half-width of the 95 % interval; a column has one unit, in its heading.
"""

from __future__ import annotations

import html
import math
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from layerlab.data import Dataset
    from layerlab.papers import Paper
    from layerlab.registry import Plugin, Registry
    from layerlab.strategy import Strategy
    from layerlab.training import Comparison, FitResult

# Rows of a fit's table; of a longer one every so-many-th epoch is shown, with the first and the last.
EPOCHS = 12
# What stands in the place of a plugin's paper begins so.
BROKEN, NO_PAPER = "broken: ", "no paper: "
_NUMBER = re.compile(r"^([+−-]?\d.*|—)?$")
_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        header: headings, with units.
        rows: of as many texts; the last one of a shorter row has the rest of the columns to itself.
        caption: a line above.
        notes: lines below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()

    @property
    def _numeric(self) -> list[bool]:
        """Which columns hold numbers, to be aligned at the right."""
        whole = [row for row in self.rows if len(row) == len(self.header)]
        return [bool(whole) and all(_NUMBER.match(row[index]) for row in whole) for index in range(len(self.header))]

    def text(self, width: int | None = None) -> str:
        """For a terminal of that many columns (default: this one's); the widest column of words gives way."""
        width = width or shutil.get_terminal_size((100, 24)).columns
        numeric, count = self._numeric, len(self.header)
        cells = [row[: len(row) - (len(row) < count)] for row in [self.header, *self.rows]]
        widths = [max(len(row[index]) for row in cells if index < len(row)) for index in range(count)]
        words = [index for index, number in enumerate(numeric) if not number]
        over = sum(widths) + 2 * (count - 1) - width
        if over > 0 and words:
            widest = max(words, key=lambda index: widths[index])
            widths[widest] = max(20, len(self.header[widest]), widths[widest] - over)
        lines = textwrap.wrap(self.caption, width) if self.caption else []
        for row in [self.header, *self.rows]:
            sizes, right = widths[: len(row)], numeric[: len(row)]
            if len(row) < count:
                sizes[-1], right[-1] = max(20, sum(widths[len(row) - 1:]) + 2 * (count - len(row))), False
            wrapped = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, sizes, strict=True)]
            for line in range(max(map(len, wrapped))):
                parts = [cell[line] if line < len(cell) else "" for cell in wrapped]
                lines.append("  ".join(part.rjust(size) if number else part.ljust(size) for part, size, number
                                       in zip(parts, sizes, right, strict=True)).rstrip())
        for note in self.notes:
            lines += textwrap.wrap(note, width)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        aligned, count = ["right" if number else "left" for number in self._numeric], len(self.header)

        def line(kind: str, cells: Sequence[str]) -> str:
            text = ""
            for index, (cell, side) in enumerate(zip(cells, aligned, strict=False)):
                rest = count - len(cells) + 1 if index == len(cells) - 1 and len(cells) < count else 1
                span = f' colspan="{rest}"' if rest > 1 else ""
                style = f"text-align: {'left' if rest > 1 else side}; vertical-align: top"
                text += f'<{kind}{span} style="{style}">{html.escape(cell)}</{kind}>'
            return f"<tr>{text}</tr>"

        caption = f"<p>{html.escape(self.caption)}</p>" if self.caption else ""
        body = "".join(line("td", row) for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"{caption}<table><thead>{line('th', self.header)}</thead><tbody>{body}</tbody></table>{notes}"


def spread(mean: float, half: float = math.nan) -> str:
    """`97.21 ± 0.40`: to two digits of the half-width; the mean alone where there is none, and — for NaN."""
    if not math.isfinite(mean):
        return "—"
    if math.isfinite(half) and half > 1e-9 * abs(mean):
        decimals = min(4, max(0, 1 - math.floor(math.log10(half))))
        return f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return f"{mean:,.0f}" if abs(mean) >= 999.95 else f"{mean:#.4g}"


def scale(values: Iterable[float], unit: str) -> tuple[float, str]:
    """(factor, unit with a prefix) that make the largest of the values a number below 1000."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for prefix, size in _PREFIXES:
        if largest >= size:
            return 1 / size, prefix + unit
    return 1.0, unit


# Heading, unit before scaling, and the factor from `SUMMARY` of `layerlab.training` to that unit.
_COLUMNS: dict[str, tuple[str, str, float]] = {
    "top-1": ("top-1", "%", 100.0),
    "seconds": ("time", "s", 1.0),
    "TFLOP": ("compute", "FLOP", 1e12),
    "GB moved": ("moved", "B", 1e9),
    "peak MB": ("peak memory", "B", 1e6),
}


def in_units(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """`Comparison.summary` or `Comparison.runs` in units that make its numbers readable.

    Returns:
        (the frame with scaled columns, column → heading with the unit, of those that were measured).
    """
    scaled, headings = frame.copy(), {}
    for name, (heading, unit, factor) in _COLUMNS.items():
        if not frame[name].notna().any():
            continue
        by, label = scale(factor * frame[name], unit) if unit in ("FLOP", "B") else (1.0, unit)
        for column in {name, f"{name} ±"} & set(frame.columns):
            scaled[column] = by * factor * frame[column]
        headings[name] = f"{heading} [{label}]"
    return scaled, headings


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm: accuracy, seconds, FLOPs, bytes moved and peak memory of a run; or why it was left out."""
    frame, headings = in_units(comparison.summary) if comparison.results else (None, {})
    rows = [[row["arm"], *(spread(row[name], row[f"{name} ±"]) for name in headings)]
            for _, row in frame.iterrows()] if frame is not None else []
    rows += [[arm, f"left out: {reason}"] for arm, reason in comparison.failures.items()]
    return Table(["arm", *headings.values()] if headings else ["arm", ""], rows, _caption(comparison))


def _caption(comparison: Comparison) -> str:
    if not comparison.results:
        return "Nothing was trained to the end."
    epochs = max(len(result.history) for result in comparison.results.values())
    seeds = len(comparison.seeds)
    return f"{epochs} epochs, " + (
        "one seed, which says nothing about the spread" if seeds == 1 else f"{seeds} seeds: mean ± 95 % interval")


def fit_table(result: FitResult) -> Table:
    """One row an epoch, or every so-many-th of a long fit: loss, accuracy, seconds, FLOPs."""
    rows = result.history
    step = -(-len(rows) // EPOCHS)
    shown = [row for number, row in enumerate(rows) if number % step == 0 or number == len(rows) - 1]
    header = ["epoch", "training loss", "test loss", "top-1 [%]", "time [s]"]
    texts = [[f"{row['epoch']}", f"{row['train/loss']:.4f}", f"{row['test/loss']:.4f}", f"{100 * row['test/top1']:.2f}",
              f"{row['time/epoch_seconds']:.2f}"] for row in shown]
    flops = [row.get("cost/forward_flops", math.nan) + row.get("cost/backward_flops", math.nan) for row in shown]
    if any(map(math.isfinite, flops)):
        by, label = scale(flops, "FLOP")
        header.append(f"compute [{label}]")
        for text, value in zip(texts, flops, strict=True):
            text.append(spread(by * value))
    return Table(header, texts, result.headline)


def plugin_row(plugin: Plugin, broken: str) -> tuple[str, str, str]:
    """An installed strategy: its name, who installs it, and its paper, or why there is none.

    Args:
        broken: why it cannot be used; empty where it can. Asked for, since to find it out is to import the plugin.
    """
    from layerlab.errors import LayerlabError
    from layerlab.papers import load_paper

    if broken:
        text = f"{BROKEN}{broken}"
    else:
        try:
            text = load_paper(plugin).citation
        except LayerlabError as error:
            text = f"{NO_PAPER}{error}"
    return plugin.name, f"{plugin.distribution} {plugin.version}", text


def registry_table(registry: Registry) -> Table:
    """One row an installed strategy: who installs it, and its paper, or why it cannot be used."""
    rows = [plugin_row(plugin, plugin.broken) for plugin in registry.every()]
    return Table(("strategy", "installed by", "paper"), rows, "" if rows else "No strategies are installed.")


def strategy_table(strategy: Strategy) -> Table:
    """One row a setting: its value, and what it does."""
    rows = [(name, str(getattr(strategy, name)), " ".join((field.description or "").split()))
            for name, field in type(strategy).model_fields.items()]
    return Table(("setting", "value", "what it does"), rows, strategy.name, () if rows else ("It has no settings.",))


def paper_table(paper: Paper) -> Table:
    """One row a claim, under the paper's title and summary."""
    rows = [(claim.id, claim.statement, f"{claim.value:g} {claim.unit}", claim.where) for claim in paper.claims]
    return Table(("claim", "statement", "published", "where"), rows,
                 f"{paper.authors}: {paper.title}. {paper.venue}, {paper.year}.",
                 [" ".join(paper.summary.split()), f"Profiles: {', '.join(paper.profiles)}."])


def dataset_table(data: Dataset) -> Table:
    """What a dataset is, a row a property."""
    channels, height, width = data.shape
    names = f" ({', '.join(data.class_names[:10])}{', …' if len(data.class_names) > 10 else ''})"
    what: Mapping[str, Any] = {
        "training images": f"{len(data.train):,}", "test images": f"{len(data.test):,}",
        "size": f"{height} × {width} pixels, {channels} channel{'s' * (channels > 1)}",
        "classes": f"{data.classes}{names if data.class_names else ''}", "from": data.source,
    } | ({"note": data.note} if data.note else {})
    return Table(("dataset", data.name), list(what.items()))


def picture(content: bytes) -> str:
    """A PNG as an HTML element."""
    import base64

    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" style="max-width: 100%">'
