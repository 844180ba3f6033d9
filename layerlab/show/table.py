"""One table in every form: text for a terminal, Markdown, HTML, CSV, LaTeX and JSON.

Numbers over seeds are mean ± half-width of the 95 % interval; a column has one unit, in its heading.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from layerlab.base.errors import LayerlabError
from layerlab.base.screen import printable
from layerlab.show.interval import unbroken

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.text import Text

Tone = Literal["", "good", "fair", "warning", "bad", "faint", "strong"]
# Tone → style at a terminal, background in HTML.
TONES: dict[Tone, tuple[str, str]] = {
    "": ("", ""), "good": ("green", "#c7e9c0"), "fair": ("cyan", "#c6dbef"), "warning": ("yellow", "#fdd0a2"),
    "bad": ("red", "#fcbba1"), "faint": ("bright_black", "#eeeeee"), "strong": ("bold", ""),
}
# Stands for a space at which a terminal's line does not end; rich breaks lines at every space that Unicode has.
_JOINT = "\uE000"
# Columns between two columns of a table at a terminal.
GAP = 2
# A cell with several columns to itself has to have that many characters a line.
_SPAN = 16
# A word, and a part of one that ends with a dash after which it may be broken.
_WORD, _PART = re.compile(r"\S+"), re.compile(r"[^-]*-+|[^-]+")
_NUMBER = re.compile(r"^([+−-]?\d.*|—)?$")
# What Markdown would take for its own: an underscore within a word, `a < b` and `[s]` are none of it.
_MARKDOWN = re.compile(r"[\\`*|~$]|<(?=[A-Za-z/!?])|\](?=[(\[])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "→": r"$\rightarrow$",
})


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text.

    Attributes:
        text: the only thing that CSV, LaTeX and JSON show.
        tone: how it is coloured at a terminal and in HTML.
        link: address that it leads to in Markdown and HTML.
        markdown: source that stands in Markdown in the place of the escaped text.
    """

    text: str
    tone: Tone = ""
    link: str = ""
    markdown: str = ""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns, to be read in a terminal, in a notebook or on a page.

    It shows itself: as text where it is printed, as HTML in a notebook. Each form escapes what it would obey; none
    ends with a line break.

    Attributes:
        header: headings, with units; none is shown where all are empty.
        rows: of as many texts; the last one of a shorter row has the rest of the columns to itself.
        caption: a line above.
        notes: lines below.

    Raises:
        LayerlabError: a row without any cell, or with more of them than there are headings.

    Example:
        >>> from layerlab import Table
        >>> rows = [["plain", "97.21 ± 0.40", "8.1"], ["mine", "left out: too slow"]]
        >>> table = Table(["arm", "top-1 [%]", "time [s]"], rows)
        >>> table
        arm       top-1 [%]  time [s]
        plain  97.21 ± 0.40       8.1
        mine   left out: too slow
        >>> print(table.markdown())
        | arm | top-1 [%] | time [s] |
        | --- | ---: | ---: |
        | plain | 97.21 ± 0.40 | 8.1 |
        | mine | left out: too slow |  |
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if not 0 < len(row) <= len(self.header):
                raise LayerlabError(f"Row {number} of a table has {len(row)} cells under {len(self.header)} headings; "
                                    "give it one for each heading, or fewer.")

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, caption: str = "", notes: Sequence[str] = ()) -> Table:
        """A pandas table without its index: numbers to four digits or as whole ones, empty where there is none.

        Example:
            >>> import pandas as pd
            >>> from layerlab import Table
            >>> Table.from_frame(pd.DataFrame({"layer": ["a", "b"], "MB": [0.123456, float("nan")]}))
            layer      MB
            a      0.1235
            b
        """
        rows = [[_value(value) for value in row] for row in frame.itertuples(index=False)]
        return cls([str(name) for name in frame.columns], rows, caption, notes)

    @property
    def _cells(self) -> list[list[Cell]]:
        """The rows, ready to be shown."""
        return [[_cell(each) for each in row] for row in self.rows]

    @property
    def _headings(self) -> list[str]:
        return [printable(name) for name in self.header]

    def _spans(self, row: Sequence[object]) -> bool:
        """Whether the last cell of a row has several columns to itself."""
        return len(row) < len(self.header)

    def _padded(self, row: Sequence[str]) -> list[str]:
        """A row's texts, with empty ones in the columns that its last cell has to itself."""
        return [*row, *[""] * (len(self.header) - len(row))]

    @property
    def _numeric(self) -> list[bool]:
        """Which columns hold numbers, to be aligned at the right."""
        whole = [row for row in self._cells if not self._spans(row)]
        columns = [[row[index].text for row in whole] for index in range(len(self.header))]
        return [any(texts) and all(map(_NUMBER.match, texts)) for texts in columns]

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html()

    def text(self, width: int | None = None, colour: bool = False) -> str:
        """For a terminal: columns side by side, or, where its width cannot carry them, one heading and value a line.

        Args:
            width: columns of the terminal. Default: this one's; 100 where there is none.
            colour: write the tones as escape sequences, which only a terminal understands.
        """
        from rich.console import Console

        stream = io.StringIO()
        console = Console(
            file=stream, width=width or shutil.get_terminal_size((100, 24)).columns, force_terminal=colour,
            force_jupyter=False, color_system="standard" if colour else None, highlight=False, markup=False,
            emoji=False,
        )
        rows = [[replace(cell, text=unbroken(cell.text, _JOINT)) for cell in row] for row in self._cells]
        replace(self, rows=rows)._draw(console)
        drawn = stream.getvalue().strip("\n").replace(_JOINT, " ")
        return "\n".join(line.rstrip() for line in drawn.split("\n"))

    def _draw(self, console: Console) -> None:
        from rich.text import Text

        if self.caption:
            console.print(Text(printable(self.caption)))
        widths = self._widths(console.width)
        if widths is None:
            self._draw_records(console)
        else:
            self._draw_columns(console, widths)
        for note in self.notes:
            console.print(Text(printable(note)))

    def _draw_columns(self, console: Console, widths: Sequence[int]) -> None:
        """Columns side by side; blank lines between the rows where the first column's texts take several lines."""
        from rich.cells import cell_len

        numeric = self._numeric
        if any(self._headings):
            _draw_line(console, [_text(name, "bold") for name in self._headings], widths, numeric)
        apart = any(cell_len(row[0].text) > widths[0] for row in self._cells if len(self.header) > 1)
        for number, row in enumerate(self._cells):
            if number and apart:
                console.print()
            sizes, right = list(widths[: len(row)]), numeric[: len(row)]
            if self._spans(row):
                # The rest of the line, also where the columns themselves are narrower.
                sizes[-1], right[-1] = console.width - sum(sizes[:-1]) - GAP * len(sizes[:-1]), False
            cells = [replace(cell, text=_broken(cell.text, size)) for cell, size in zip(row, sizes, strict=True)]
            _draw_line(console, map(_styled, cells), sizes, right)

    def _draw_records(self, console: Console) -> None:
        """Each row as lines of heading and value, between blank lines; what is empty is left out."""
        from rich.cells import cell_len

        longest = min(max(map(cell_len, self._headings)), console.width // 3)
        for row in self._cells:
            console.print()
            names = self._headings[: len(row)]
            if self._spans(row):
                names[-1] = ""
            for name, cell in zip(names, row, strict=True):
                if cell.text:
                    _draw_line(console, [_text(name, "bold"), _styled(cell)], [longest, console.width - longest - GAP],
                               [False, False])
        console.print()

    def _widths(self, width: int) -> list[int] | None:
        """The width of each column, the widest giving way first; None where their longest words have no room.

        A number stays in one line with its interval and unit; headings and words may be wrapped. Words are broken after
        a dash only where that saves the columns.
        """
        return self._fitted(width, _WORD) or self._fitted(width, _PART)

    def _fitted(self, width: int, whole_part: re.Pattern[str]) -> list[int] | None:
        """As `_widths`, where what the pattern finds in a text is not broken, unless it has _SPAN characters a line."""
        from rich.cells import cell_len

        widths, least = [], []
        whole = [row for row in self._cells if not self._spans(row)]
        before = [row[:-1] for row in self._cells if self._spans(row)]
        for index, (name, number) in enumerate(zip(self._headings, self._numeric, strict=True)):
            texts = [row[index].text for row in [*whole, *before] if index < len(row)]
            words = [word for text in [name, *texts] for word in text.split()]
            parts = [part for word in words for part in whole_part.findall(word)]
            longest = max(map(cell_len, words), default=0)
            # A column that is narrower than its longest word would look like a column of syllables.
            least_room = min(longest, max(_SPAN, max(map(cell_len, parts), default=0)))
            widths.append(max(map(cell_len, [name, *texts])))
            least.append(max([least_room, *map(cell_len, texts)]) if number else least_room)
        if len(widths) == 1:
            # Beside one column nothing else needs room; a longer word is broken.
            return [min(widths[0], width)]
        while sum(widths) + GAP * (len(widths) - 1) > width:
            able = [index for index in range(len(widths)) if widths[index] > least[index]]
            if not able:
                return None
            widths[max(able, key=widths.__getitem__)] -= 1
        room = [width - sum(widths[: len(row)]) - GAP * len(row) for row in before]
        return widths if min(room, default=_SPAN) >= _SPAN else None

    def markdown(self) -> str:
        """As Markdown, GitHub's kind."""
        lines = [" | ".join(map(markdown_text, self._headings)),
                 " | ".join("---:" if number else "---" for number in self._numeric)]
        lines += [" | ".join(self._padded([_markdown_cell(cell) for cell in row])) for row in self._cells]
        table = "\n".join(f"| {line} |" for line in lines)
        above, *below = [markdown_text(printable(text)) for text in (self.caption, *self.notes)]
        return "\n\n".join(part for part in (above, table, *below) if part)

    def html(self) -> str:
        """As HTML, which needs no style sheet."""
        sides = ["right" if number else "left" for number in self._numeric]
        count = len(self.header)
        head = "".join(_html_cell("th", Cell(name), side) for name, side in zip(self._headings, sides, strict=True))
        lines = []
        for row in self._cells:
            parts = [_html_cell("td", cell, side) for cell, side in zip(row, sides, strict=False)]
            if self._spans(row):
                parts[-1] = _html_cell("td", row[-1], "left", count - len(row) + 1)
            lines.append(f"<tr>{''.join(parts)}</tr>")
        above = f"<p>{_html(self.caption)}</p>" if self.caption else ""
        below = "".join(f"<p>{_html(note)}</p>" for note in self.notes)
        header = f"<thead><tr>{head}</tr></thead>" if any(self._headings) else ""
        return f"{above}<table>{header}<tbody>{''.join(lines)}</tbody></table>{below}"

    def csv(self) -> str:
        """As CSV: header and rows, without caption and notes."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self._headings)
        writer.writerows(self._padded([cell.text for cell in row]) for row in self._cells)
        return stream.getvalue().removesuffix("\n")

    def latex(self) -> str:
        r"""As a LaTeX `tabular` (packages booktabs and textcomp), caption and notes as paragraphs around it."""
        columns = "".join("r" if number else "l" for number in self._numeric)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        if any(self._headings):
            lines += [" & ".join(map(_latex, self._headings)) + r" \\", r"\midrule"]
        for row in self._cells:
            parts = [_latex(cell.text) for cell in row]
            if self._spans(row):
                parts[-1] = rf"\multicolumn{{{len(self.header) - len(row) + 1}}}{{l}}{{{parts[-1]}}}"
            lines.append(" & ".join(parts) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        above, *below = [_latex(printable(text)) for text in (self.caption, *self.notes)]
        return "\n\n".join(part for part in (above, "\n".join(lines), *below) if part)

    def json(self) -> str:
        """As JSON: `caption`, `columns`, `rows` (lists of texts, a shorter one where a cell spans) and `notes`."""
        content = {"caption": printable(self.caption), "columns": self._headings,
                   "rows": [[cell.text for cell in row] for row in self._cells],
                   "notes": [printable(note) for note in self.notes]}
        return json.dumps(content, ensure_ascii=False, indent=1)


def _cell(content: str | Cell) -> Cell:
    if isinstance(content, str):
        return Cell(printable(content))
    return Cell(printable(content.text), content.tone, content.link, content.markdown)


def _value(value: Any) -> str:
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    # An exponent says less than the digits of a count.
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e8 else f"{value:.4g}"


def _text(text: str, style: str) -> Text:
    """A styled text; what rich fills its line up with has no style."""
    from rich.text import Text

    return Text().append(text, style=style)


def _broken(text: str, width: int) -> str:
    """A text in which words that are longer than a line are broken after a dash, if they have one."""
    from rich.cells import cell_len

    def lines(word: str) -> str:
        found = [""]
        for part in _PART.findall(word):
            if found[-1] and cell_len(found[-1] + part) > width:
                found.append("")
            found[-1] += part
        return "\n".join(found)

    return _WORD.sub(lambda found: lines(found[0]) if cell_len(found[0]) > width else found[0], text)


def _styled(cell: Cell) -> Text:
    return _text(cell.text, TONES[cell.tone][0])


def _draw_line(console: Console, cells: Iterable[Text], widths: Sequence[int], right: Sequence[bool]) -> None:
    """A row whose cells are wrapped to the widths."""
    from rich.table import Table as Grid

    grid = Grid.grid(padding=(0, GAP, 0, 0))
    for width, number in zip(widths, right, strict=True):
        grid.add_column(width=width, justify="right" if number else "left", overflow="fold")
    grid.add_row(*cells)
    console.print(grid)


def markdown_text(text: str) -> str:
    """A text as Markdown that shows just this text."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", text)


def _markdown_cell(cell: Cell) -> str:
    if cell.markdown:
        return cell.markdown
    text = markdown_text(cell.text)
    return f"[{text}]({cell.link})" if cell.link else text


def _html(text: str) -> str:
    return html.escape(printable(text))


def _html_cell(kind: str, cell: Cell, side: str, columns: int = 1) -> str:
    background = TONES[cell.tone][1]
    style = f"text-align: {side}; vertical-align: top" + (f"; background-color: {background}" if background else "")
    text = f'<a href="{html.escape(cell.link)}">{_html(cell.text)}</a>' if cell.link else _html(cell.text)
    span = f' colspan="{columns}"' if columns > 1 else ""
    return f'<{kind}{span} style="{style}">{text}</{kind}>'


def _latex(text: str) -> str:
    return text.translate(_LATEX)
