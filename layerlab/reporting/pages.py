"""Pages of what is kept: a paper's own, the scoreboard of all, and the table of papers for a README. All Markdown."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import pandas as pd

from layerlab.base.errors import LayerlabError
from layerlab.base.provenance import versions_text
from layerlab.base.text import reproduce_command
from layerlab.contract.claims import ClaimResult, Verdict
from layerlab.contract.paper import Paper, readable_papers
from layerlab.contract.rows import completed, counts, merged
from layerlab.reporting.scoreboard import scoreboard_table
from layerlab.runs.record import PARAMETERS, PARTS, RESULTS, read_results
from layerlab.show.table import Cell, Table, markdown_text

SUMMARY = ("<!-- papers -->", "<!-- /papers -->")
# Of a plugin that lies beside the results.
CARD = "plugins/{}/README.md"
# A table with more rows is folded.
LONG = 20


def kept_profiles(folder: Path, paper: Paper) -> dict[Path, list[ClaimResult]]:
    """What is kept of a paper, by the folder of each profile, with the verdicts that the values have today."""
    return {
        file.parent: [paper.judged(row) for row in read_results(file.parent)]
        for file in sorted(folder.glob(f"*/{RESULTS}"))
    }


def kept(target: Path, paper: Paper) -> list[ClaimResult]:
    """A paper's claims in its order: what is kept of each, or a row that says `not run`.

    Raises:
        LayerlabError: what is kept cannot be read.
    """
    folder = target / paper.strategy
    return completed(paper, read_results(folder) if (folder / RESULTS).exists() else ())


def scoreboard_page(target: Path) -> str:
    """Every claim of every installed paper, in Markdown."""
    claims = [(paper, kept(target, paper)) for paper in readable_papers()]
    lines: list[list[str | Cell]] = [
        [Cell(paper.strategy, link=f"#{paper.strategy}"), *counts(rows).values()] for paper, rows in claims]
    about = (
        "Every claim of every paper, published beside measured, as `layerlab publish` takes it from the runs that "
        "MLflow holds. [README.md](../README.md#reproduce-a-paper) says what the verdicts mean; a measured value is "
        "the mean over seeds ± the half-width of its 95 % interval."
    )
    text = ["# Results", about, Table(("paper", *get_args(Verdict)), lines).markdown()]
    for paper, rows in claims:
        text += [f"## {paper.strategy}", f"{paper.citation}."]
        if (target / paper.strategy / "README.md").exists():
            text[-1] += f" [Tables and figures]({paper.strategy}/README.md)."
        text.append(scoreboard_table(rows).markdown())
    return "\n\n".join(text) + "\n"


def _card(target: Path, name: str) -> bool:
    return (target.resolve().parent / CARD.format(name)).exists()


def with_papers(readme: str, target: Path) -> str | None:
    """A README with the table of papers between its marks anew; None if it has none."""
    before, mark, rest = readme.partition(SUMMARY[0])
    _, end, after = rest.partition(SUMMARY[1])
    if not (mark and end):
        return None
    lines: list[list[str | Cell]] = []
    for paper in readable_papers():
        name, rows = paper.strategy, kept(target, paper)
        card = f"[`{name}`]({CARD.format(name)})" if _card(target, name) else f"`{name}`"
        title = f"{paper.short_authors}, {paper.title}, {paper.year}"
        source = f"{markdown_text(paper.short_authors)}, *{markdown_text(paper.title)}*, {paper.year}"
        page = Cell("quick only", markdown="`quick` only")
        if (target / name / "README.md").exists():
            page = Cell("claims and figures", link=f"{target.name}/{name}/README.md")
        lines.append([Cell(name, markdown=card), Cell(title, markdown=source), *counts(rows).values(), page])
    table = Table(("plugin", "paper", *get_args(Verdict), ""), lines).markdown()
    return f"{before}{mark}\n{table}\n{end}{after}"


def paper_page(folder: Path, paper: Paper) -> str:
    """A paper's claims, then of each profile that is kept in its folder the tables and figures, in the order of the
    notebook and with its texts, in Markdown."""
    profiles = kept_profiles(folder, paper)
    text = [f"# {paper.title}", f"{paper.authors}. {paper.venue}, {paper.year}.", paper.summary.strip()]
    if _card(folder.parent, paper.strategy):
        card = f"[method card](../../{CARD.format(paper.strategy)})"
        text.append(f"What was tried, and what was difficult to reproduce: the {card}.")
    text += ["## Claims", scoreboard_table(merged(chain.from_iterable(profiles.values()))).markdown()]
    sections = _sections(paper)
    for profile, rows in profiles.items():
        some = next((row for row in rows if row.machine), None)
        parameters = json.loads((profile / PARAMETERS).read_text())
        about = paper.profile(profile.name).description
        text += [f"## Profile `{profile.name}`", f"{about[:1].upper()}{about[1:]}."]
        if some:
            text.append(f"Command: `{_command(paper, profile.name, parameters)}`. Machine: "
                        f"{some.machine}. Commit: `{some.commit}`. Versions: {versions_text(some.versions)}.")
        text.append("<details><summary>Parameters</summary>\n\n```json\n"
                    + json.dumps(parameters, indent=1, ensure_ascii=False) + "\n```\n</details>")
        text += _shown(profile, sections)
    return "\n\n".join(text) + "\n"


def _command(paper: Paper, profile: str, parameters: Mapping[str, Any]) -> str:
    usual = json.loads(json.dumps(paper.profile(profile).parameters))
    changed = {name: value for name, value in parameters.items() if name in usual and value != usual[name]}
    return reproduce_command(paper.strategy, profile, changed)


@dataclass
class _Section:
    """A part of a notebook: its heading and text; of all that the cells behind it keep, the part of the folder and a
    pattern of the name; and what is said of that afterwards."""

    heading: str = ""
    text: str = ""
    keeps: list[tuple[str, str]] = field(default_factory=list)
    after: str = ""


def _sections(paper: Paper) -> list[_Section]:
    try:
        cells = json.loads(paper.notebook_file.read_text(encoding="utf-8"))["cells"]
    except (LayerlabError, OSError, ValueError, KeyError):
        return []
    sections = [_Section()]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            sections[-1].keeps += _keeps(source)
            continue
        last, found = sections[-1], re.search(r"(?m)^#+ .*$", source)
        if found:
            last.after = source[: found.start()].strip()
            sections.append(_Section(found[0], source[found.end() :].strip()))
        else:
            sections.append(_Section(last.heading, source.strip()))
    return sections


def _keeps(source: str) -> Iterator[tuple[str, str]]:
    """The tables and figures that a cell's code keeps; of a name that is put together, what stands still."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="table" | "figure" as kind), args=[name, *_]):
                match name:
                    case ast.Constant(value=str(fixed)):
                        yield f"{kind}s", re.escape(fixed)
                    case ast.JoinedStr(values=parts):
                        yield f"{kind}s", "".join(
                            re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts)


def _shown(profile: Path, sections: Sequence[_Section]) -> Iterator[str]:
    """The tables and figures of a profile's folder under the texts that belong to them."""
    files = [file for part in PARTS for file in sorted((profile / part).glob("*.*")) if file.stat().st_size > 1]
    # The more of a name stands still, the surer that it is meant.
    places = sorted(((-len(pattern.replace(".+", "")), number, part, pattern)
                     for number, section in enumerate(sections) for part, pattern in section.keeps))
    placed: dict[int, list[Path]] = {}
    for file in files:
        number = next((number for _, number, part, pattern in places
                       if part == file.parent.name and re.fullmatch(pattern, file.stem)), len(sections))
        placed.setdefault(number, []).append(file)
    last = ""
    for number in sorted(placed):
        section = sections[number] if number < len(sections) else _Section()
        heading = f"#{section.heading}" if section.heading not in ("", last) else ""
        last = section.heading
        entries = [_entry(file, quote(file.relative_to(profile.parent).as_posix())) for file in placed[number]]
        yield from filter(None, [heading, section.text, *entries, section.after])


def _entry(file: Path, address: str) -> str:
    if file.suffix != ".csv":
        return f"![{file.stem}]({address})"
    frame = pd.read_csv(file)
    frame = frame.rename(columns=lambda name: "" if str(name).startswith("Unnamed") else str(name))
    table = Table.from_frame(frame.loc[:, frame.notna().any()]).markdown()
    if len(frame) > LONG:
        table = f"<details><summary>{len(frame)} rows</summary>\n\n{table}\n\n</details>"
    return f"Table [{file.stem}]({address}):\n\n{table}"
