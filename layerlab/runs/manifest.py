"""The manifest of a session: the tables and figures that it keeps, in order, under the texts of its notebook."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from layerlab.base.errors import LayerlabError, first_problem, sentence
from layerlab.base.names import FileName
from layerlab.runs.record import MANIFEST, notebook_cells

Kind = Literal["table", "figure"]


class Shown(BaseModel):
    """A table or a figure that a session keeps.

    Attributes:
        kind: table or figure.
        name: of the file, without folder and ending.
    """

    kind: Kind
    name: FileName

    @property
    def file(self) -> str:
        """Where it lies in the session's folder.

        >>> Shown(kind="table", name="I").file
        'tables/I.csv'
        """
        ending = {"table": "csv", "figure": "png"}[self.kind]
        return f"{self.kind}s/{self.name}.{ending}"


class Section(BaseModel):
    """A part of a notebook, from one text cell to the next.

    Attributes:
        heading: the Markdown line that it stands under, which several sections may share.
        text: stands before the code.
        shows: the tables and figures that the code keeps, in order.
        after: stands behind the code, before the next heading.
    """

    heading: str = ""
    text: str = ""
    shows: list[Shown] = []
    after: str = ""


class Manifest:
    """Notes each table and figure in the section of the notebook whose cell is running.

    What no cell of the notebook keeps (a script, a cell that is edited and not saved) stands in a last section without
    a text.

    Args:
        notebook: the notebook's file; None where it is unknown.

    Raises:
        LayerlabError: the file is not a notebook.
    """

    def __init__(self, notebook: Path | None = None) -> None:
        cells = notebook_cells(notebook) if notebook else []
        sections, self._places = _sections(cells)
        self._sections = [*sections, Section()]

    def add(self, kind: Kind, name: str) -> Shown:
        """Note a table or figure that the running cell keeps; one that is kept again is listed once.

        Raises:
            LayerlabError: the name cannot be a file's.
        """
        try:
            shown = Shown(kind=kind, name=name)
        except ValidationError as error:
            raise LayerlabError(sentence(error, f"The {kind} {name!r}")) from None
        section = self._sections[_running_section(self._places)]
        for other in self._sections:
            if other is not section and shown in other.shows:
                other.shows.remove(shown)
        if shown not in section.shows:
            section.shows.append(shown)
        return shown

    def shown(self, kind: Kind) -> list[Shown]:
        """All tables, or all figures, that were noted."""
        return [shown for section in self._sections for shown in section.shows if shown.kind == kind]

    def content(self) -> list[dict[str, Any]]:
        """The sections that show something, in the notebook's order, as JSON."""
        return [section.model_dump() for section in self._sections if section.shows]


def read_manifest(folder: Path) -> list[Section]:
    """The sections that a session noted in its folder.

    Raises:
        LayerlabError: there are none, the file holds something else, or a table or figure that it lists is missing.
    """
    remedy = "run `layerlab reproduce` again, with --rerun"
    try:
        sections = TypeAdapter(list[Section]).validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise LayerlabError(f"{folder} lacks its {MANIFEST}; {remedy}.") from None
    except ValidationError as error:
        raise LayerlabError(
            f"{folder / MANIFEST} does not list a run's tables and figures ({first_problem(error)}); {remedy}."
        ) from None
    for section in sections:
        for shown in section.shows:
            if not (folder / shown.file).is_file():
                raise LayerlabError(f"{folder} lacks {shown.file}, which its {MANIFEST} lists; {remedy}.")
    return sections


def _sections(cells: Sequence[tuple[str, str]]) -> tuple[list[Section], list[tuple[str, int]]]:
    """The sections of a notebook, and of each code cell its code and the number of its section."""
    sections, places = [Section()], []
    for kind, source in cells:
        if kind == "code":
            places.append((source.rstrip("\n"), len(sections) - 1))
            continue
        last, heading = sections[-1], re.search(r"(?m)^#+ .*$", source)
        if heading is None:
            sections.append(Section(heading=last.heading, text=source.strip()))
        else:
            last.after = source[: heading.start()].strip()
            sections.append(Section(heading=heading[0], text=source[heading.end() :].strip()))
    return sections, places


def _running_section(places: Sequence[tuple[str, int]]) -> int:
    """The number of the section whose cell IPython is running; -1 where the notebook has no such cell."""
    from IPython import get_ipython

    shell = get_ipython()
    # The code of every cell so far as its author wrote it, the running one last.
    history = shell.history_manager.input_hist_raw if shell else [""]
    numbers = [number for code, number in places if code == history[-1]]
    if not numbers:
        return -1
    # Where several cells have the same code, the first run of it is the first cell's, and so on.
    return numbers[(history.count(history[-1]) - 1) % len(numbers)]
