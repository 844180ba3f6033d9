"""Pages of what is kept: a paper's own, the scoreboard of all, and what a README shows of them. All Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import pandas as pd

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.provenance import versions_text
from layerlab.base.screen import printable, visible
from layerlab.base.text import reproduce_command
from layerlab.contract.claims import OLDER, ClaimResult, Verdict
from layerlab.contract.headings import headings_of
from layerlab.contract.paper import Paper, readable_papers
from layerlab.contract.rows import counts, merged
from layerlab.reporting.bottom_line import bottom_line, headline_finding, kept_line, kept_outcomes, markdown_line
from layerlab.reporting.freshness import Age, age
from layerlab.reporting.kept import kept, kept_profiles
from layerlab.reporting.overall import overall
from layerlab.reporting.overview import ALTERNATIVE, CAPTION, NOTHING_YET, OVERVIEW
from layerlab.reporting.readable import headed, papers_alone, readable
from layerlab.reporting.scoreboard import claims_table, scoreboard_table
from layerlab.runs.manifest import read_manifest
from layerlab.runs.record import read_parameters
from layerlab.show.interval import with_minus
from layerlab.show.stamp import same_picture
from layerlab.show.table import Cell, Table, markdown_text

# First line of every page, by which `layerlab publish` knows what it may replace.
MARK = "<!-- written by `layerlab publish`; changes are lost when it is run again -->"
SUMMARY = ("<!-- papers -->", "<!-- /papers -->")
PICTURE = ("<!-- overview -->", "<!-- /overview -->")
# Of a plugin that lies beside the results.
CARD = "plugins/{}/README.md"
# A table with more rows is folded.
LONG = 20


def lines(target: Path) -> tuple[str, list[tuple[Paper, str]]]:
    """From what is kept: what all installed papers say together, empty where nothing was compared; and each of them
    with its sentence."""
    runs = [(paper, kept_outcomes(kept_profiles(target / paper.strategy, paper))) for paper in readable_papers()]
    together = overall(headline_finding(paper, left) for paper, left in runs)
    return together, [(paper, bottom_line(paper, left)) for paper, left in runs]


def scoreboard_page(target: Path) -> str:
    """The sentence of every installed paper, their figure, and every claim, in Markdown."""
    claims = [(paper, kept(target, paper)) for paper in readable_papers()]
    counted: list[list[str | Cell]] = [
        [Cell(paper.strategy, link=f"#{paper.strategy}"), *counts(rows).values()] for paper, rows in claims]
    together, sentences = lines(target)
    said = "\n".join(f"- {markdown_line(paper, line)}" for paper, line in sentences)
    about = (
        "Every claim of every paper, published beside measured, as `layerlab publish` takes it from the runs that "
        "MLflow holds. [docs/verdicts.md](../docs/verdicts.md) says what the verdicts mean; a measured value is "
        "the mean over seeds ± the half-width of its 95 % interval."
    )
    text = [MARK, "# Results", markdown_text(together), said, _picture(target, ""), "## Claims by verdict",
            about, Table(("paper", *get_args(Verdict)), counted).markdown()]
    for paper, rows in claims:
        text += [f"## {paper.strategy}", f"{paper.citation}."]
        if (target / paper.strategy / "README.md").exists():
            text[-1] += f" [Tables and figures]({paper.strategy}/README.md)."
        text.append(claims_table(rows).markdown())
    return "\n\n".join(filter(None, text)) + "\n"


def _picture(target: Path, folder: str) -> str:
    """The figure of all papers with the sentence below it, seen from a page beside `folder`."""
    numbers = target / f"{OVERVIEW}.csv"
    drawn = numbers.exists() and numbers.read_text(encoding="utf-8").count("\n") > 1
    return f"![{ALTERNATIVE}]({folder}{OVERVIEW}.png)\n\n{CAPTION}" if drawn else NOTHING_YET


def _card(target: Path, name: str) -> bool:
    return (target.resolve().parent / CARD.format(name)).exists()


def with_results(readme: str, target: Path) -> str | None:
    """A README with the figure of all papers and their sentences between its marks anew; None if it has neither."""
    together, sentences = lines(target)
    told = []
    for paper, line in sentences:
        name = paper.strategy
        links = [f"[what was tried]({CARD.format(name)})"] if _card(target, name) else []
        if (target / name / "README.md").exists():
            links.append(f"[claims and figures]({target.name}/{name}/README.md)")
        source = f"{markdown_text(paper.short_authors)}, *{markdown_text(paper.title)}*, {paper.year}"
        told.append(f"- {markdown_line(paper, line)}  \n  <sub>`{name}`: {'; '.join([source, *links])}</sub>")
    said = "\n\n".join(filter(None, [markdown_text(together), "\n".join(told)]))
    blocks = {SUMMARY: said, PICTURE: _picture(target, f"{target.name}/")}
    found = None
    for (begin, end), block in blocks.items():
        before, mark, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if mark and closed:
            found = readme = f"{before}{mark}\n{block}\n{closed}{after}"
    return found


def paper_page(folder: Path, paper: Paper) -> str:
    """A paper's claims, then of each profile that is kept in its folder the tables and figures, in the order of the
    notebook and with its texts, in Markdown."""
    profiles = kept_profiles(folder, paper)
    text = [MARK, f"# {paper.title}", f"{paper.authors}. {paper.venue}, {paper.year}.", paper.summary.strip()]
    if _card(folder.parent, paper.strategy):
        card = f"[method card](../../{CARD.format(paper.strategy)})"
        text.append(f"What was tried, and what was difficult to reproduce: the {card}.")
    text.append(f"**{markdown_text(kept_line(paper, profiles))}**")
    text += ["## Claims", with_minus(scoreboard_table(merged(chain.from_iterable(profiles.values()))).markdown())]
    before: dict[Path, str] = {}
    for profile, rows in profiles.items():
        text += run_part(profile, paper, profile.name, rows, before)
    return "\n\n".join(text) + "\n"


def run_part(
    folder: Path, paper: Paper, name: str, rows: Sequence[ClaimResult], before: dict[Path, str] | None = None
) -> list[str]:
    """The paragraphs of a paper's page about one of the runs that are kept.

    Args:
        folder: where the run's tables, figures and parameters lie.
        name: of the folder where they are kept, beside the page.
        rows: the run's.
        before: what the page shows already: file → its address; what this part shows is added to it.

    Raises:
        LayerlabError: the paper has no such profile; a table that cannot be read.
    """
    some = next((row for row in rows if row.machine), None)
    parameters = read_parameters(folder)
    profile = rows[0].profile if rows else name
    about = paper.profile(profile).description
    text = [f"## Profile `{profile}`", f"{about[:1].upper()}{about[1:]}."]
    if other := next((row for row in rows if row.changed), None):
        text.append(_changed(other))
    text += _aged(age(folder, paper))
    if some:
        result = f"Result: {_code(some.result)}. " if some.result else ""
        text.append(f"{result}Command: {_code(_command(paper, profile, parameters))}. Machine: {_plain(some.machine)}. "
                    f"Commit: {_code(some.commit)}. Versions: {_plain(versions_text(some.versions))}.")
    shown = visible(json.dumps(parameters, indent=1, ensure_ascii=False))
    text.append(f"<details><summary>Parameters</summary>\n\n```json\n{shown}\n```\n</details>")
    return text + list(_shown(folder, name, paper, {} if before is None else before))


def _plain(text: str) -> str:
    """A text of a run, which may come from anybody, as Markdown that shows it."""
    return markdown_text(printable(text))


def _code(text: str) -> str:
    """The same as code, which obeys nothing but a backtick."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _command(paper: Paper, profile: str, parameters: Mapping[str, Any]) -> str:
    usual = paper.profile(profile).parameters
    changed = {name: value for name, value in paper.differing(profile, parameters).items()
               if name in usual and value is not None}
    return reproduce_command(paper.strategy, profile, changed)


def _aged(its: Age) -> list[str]:
    """What of a run older code made."""
    if its.numbers:
        return [f"**{OLDER[:1].upper()}{OLDER[1:]}** ({_plain(its.numbers)}): it counts for no verdict and waits for a "
                "new run."]
    if its.figures:
        return [f"**Figures drawn by older code** ({_plain(its.figures)}): the numbers are of today's."]
    return []


def _changed(row: ClaimResult) -> str:
    """Which parameters a run had that its profile has not, and the other way round, folded."""
    lines = []
    for name, value in row.changed.items():
        had = f"the run had {_code(json.dumps(value, ensure_ascii=False))}"
        lines.append(f"- {_code(name)}: {'the run did not know it' if value is None else had}")
    count = f"{len(lines)} parameter{'s' * (len(lines) != 1)}"
    return (f"<details><summary>The run differs from today's profile in {count}; it counts for no verdict</summary>\n\n"
            + "\n".join(lines) + "\n</details>")


def _shown(folder: Path, name: str, paper: Paper, before: dict[Path, str]) -> Iterator[str]:
    """The tables and figures of a profile's folder, under the texts that its notebook had when it ran; what the page
    shows already is named alone."""
    last = ""
    for section in read_manifest(folder):
        if section.heading not in ("", last):
            yield f"#{section.heading}"
        last = section.heading
        entries = []
        for shown in section.shows:
            file, address = folder / shown.file, quote(f"{name}/{shown.file}")
            if same := next((there for other, there in before.items() if _same(file, other)), ""):
                entries.append(f"{shown.kind.capitalize()} {_plain(shown.name)} is the same as [above]({same}).")
            else:
                before[file] = address
                entries.append(_entry(file, address, paper))
        yield from filter(None, [section.text, *entries, section.after])


def _same(file: Path, other: Path) -> bool:
    """Whether two files show the same."""
    if file.suffix != other.suffix:
        return False
    one, two = file.read_bytes(), other.read_bytes()
    try:
        return one == two or (file.suffix == ".png" and same_picture(one, two))
    except OSError:  # what is no picture
        return False


def _entry(file: Path, address: str, paper: Paper) -> str:
    """A figure, or a table with its rows; nothing for a table that holds the paper's own rows alone."""
    if file.suffix != ".csv":
        return f"![{_plain(file.stem)}]({address})"
    try:
        frame = pd.read_csv(file)
    except ValueError as error:  # pandas' own are of this kind, and an encoding's
        raise LayerlabError(f"{file} is no table that can be read ({first_line(error)}); run `layerlab reproduce` "
                            "again, with --rerun.") from None
    frame = frame.rename(columns=lambda name: "" if str(name).startswith("Unnamed") else str(name))
    if papers_alone(frame, file.stem, paper):
        return ""
    shown = headed(frame.loc[:, frame.notna().any()], headings_of(file.stem, paper.headings))
    table = with_minus(Table.from_frame(readable(shown)).markdown())
    if len(frame) > LONG:
        table = f"<details><summary>{len(frame)} rows</summary>\n\n{table}\n\n</details>"
    return f"Table [{_plain(file.stem)}]({address}):\n\n{table}"
