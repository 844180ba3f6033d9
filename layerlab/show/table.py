"""How results show themselves: one formatter for a terminal (aligned text) and a notebook (HTML).

Numbers over seeds are mean ± half-width of the 95 % interval; a column has one unit, in its heading.
"""

from __future__ import annotations

import html
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"^([+−-]?\d.*|—)?$")


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


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of texts, without a final line break."""
    def text(cell: object) -> str:
        return str(cell).replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(map(text, row)) + " |" for row in rows]
    return "\n".join(lines)
