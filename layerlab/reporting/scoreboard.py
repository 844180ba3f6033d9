"""The scoreboard: every claim with what was measured of it, as a table for a terminal, a page or a notebook."""

from __future__ import annotations

import html
import json
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from layerlab.base.errors import LayerlabError, LayerlabWarning, first_problem
from layerlab.base.screen import printable
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper, load_paper, readable_papers
from layerlab.contract.rows import SCOREBOARD, completed, scoreboard_texts
from layerlab.contract.rows import tally as tally
from layerlab.reporting.bottom_line import bottom_line, counting, headline_finding, markdown_line, parted
from layerlab.reporting.claim_lines import STATES, State, claim_lines
from layerlab.reporting.findings import PAYS, Finding, Outcome, outcome
from layerlab.reporting.freshness import age
from layerlab.reporting.kept import kept_profiles
from layerlab.reporting.overall import overall
from layerlab.runs import tracking
from layerlab.runs.answer import ANSWERS_FILE
from layerlab.runs.record import IDENTITY, workbook_folder
from layerlab.show.interval import unbroken
from layerlab.show.table import Cell, Table, Tone, markdown_text

WIDE = ("claim", "where", "published", "measured", "÷ published", "verdict")
# Columns of a terminal that has room for them.
_WIDE = 120
BRIEF = ("claim", "published", "measured", "verdict")
# First word of a verdict → how its cell looks.
VERDICT_TONES: dict[str, Tone] = {
    "reproduced": "good", "holds": "good", "weaker": "fair", "undecided": "faint", "differs": "warning",
    "opposite": "warning", "not": "faint", "by": "faint",
}


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:90em;padding:0 1em;color:#1c2733}"
    "table{border-collapse:collapse}th,td{border-bottom:1px solid #ddd;padding:.35em .6em;vertical-align:top}"
    ".wide{overflow-x:auto}ul{padding-left:1.2em}li{margin:.35em 0}"
)


def verdict_cell(verdict: str) -> Cell:
    """A verdict in its colour, with its reason or without it."""
    return Cell(verdict, VERDICT_TONES.get(verdict.split()[0], ""))


def scoreboard_table(results: Sequence[ClaimResult]) -> Table:
    """The scoreboard: one row a claim, published beside measured, verdicts in colour."""
    rows = [[verdict_cell(text) if name == "verdict" else text for name, text in row.items()]
            for row in scoreboard_texts(results)]
    return Table(SCOREBOARD, rows)


def claims_table(results: Sequence[ClaimResult], wide: bool = True) -> Table:
    """The claims of one paper, a line each with its runs beside each other: settled ones, open ones, and apart those
    that a model computed.

    Args:
        results: of one paper.
        wide: with the place in the paper and measured ÷ published, for which a terminal has no room.
    """
    rows: list[list[str | Cell]] = []
    found = claim_lines(results)
    for state in get_args(State):
        those = [line for line in found if line.state == state]
        if those:
            rows.append([Cell(STATES[state], "strong", markdown=f"**{STATES[state]}**")])
        for line in those:
            verdict = verdict_cell(line.verdict)
            rows.append([line.claim, line.where, line.published, line.measured, line.share, verdict] if wide else
                        [line.claim, line.published, line.measured, verdict])
    return Table(WIDE if wide else BRIEF, rows)


def _rows(paper: Paper, run: Any) -> list[ClaimResult]:
    """What a run says of its own paper's claims; whatever else its plugin may have written there is left out."""
    name = paper.strategy
    try:
        rows = [ClaimResult.model_validate_json(row) for row in tracking.claim_rows(run)]
    except ValidationError as error:
        warnings.warn(f"The run {run.info.run_id} of {name} is left out: its claims cannot be read "
                      f"({first_problem(error)}).", LayerlabWarning, stacklevel=3)
        return []
    parameters = tracking.run_parameters(run)
    return [paper.judged(row) if parameters is None else paper.placed(row, parameters)
            for row in rows if row.paper == name]


class Collected(NamedTuple):
    """What MLflow and the published results hold of a paper.

    Attributes:
        paper: the paper.
        rows: every claim with what was measured of it.
        line: the paper's sentence.
        found: what it says, where the paper has a headline.
    """

    paper: Paper
    rows: list[ClaimResult]
    line: str
    found: Finding | None = None


def collected(names: Sequence[str] = (), published: Path | None = None) -> list[Collected]:
    """The newest finished run in MLflow of each profile of papers, and of each set of parameters that is not the
    profile's; where MLflow has none, what is published of it.

    Args:
        names: strategies; default: all that are installed, but for those without a readable paper, each with a warning.
        published: the folder of results. Default: the workbook's.

    Raises:
        LayerlabError: an unknown strategy; a tracking database that cannot be read.
    """
    # What could not be logged when it was finished belongs to it.
    tracking.send_unsent(tracking.unsent_files())
    published = published or workbook_folder() / "results"
    found = []
    for paper in [load_paper(name) for name in names] or readable_papers():
        newest: dict[tuple[str, str], Outcome] = {}
        for run in tracking.notebook_runs(paper.strategy):
            said = _rows(paper, run)
            if (which := _experiment(run.data.tags.get("profile", ""), said)) not in newest:
                newest[which] = _outcome(paper, run, said)
        for folder, rows in _published(paper, published).items():
            newest.setdefault(_experiment(rows[0].profile, rows), outcome(folder, rows))
        results = [row for each in newest.values() for row in each.rows]
        counted = [each for each in newest.values() if counting(each.rows)]
        found.append(Collected(paper, completed(paper, results), bottom_line(paper, counted),
                               headline_finding(paper, counted)))
    return found


def _experiment(profile: str, rows: Sequence[ClaimResult]) -> tuple[str, str]:
    """What a run is of: it is told by what was set, not by the code, which changes from day to day."""
    return profile, json.dumps(next((row.changed for row in rows if row.changed), {}), sort_keys=True)


def _published(paper: Paper, results: Path) -> dict[Path, list[ClaimResult]]:
    """What is published of a paper, by its folder; its runs are in the MLflow of those who made them."""
    try:
        kept = kept_profiles(results / paper.strategy, paper)
    except LayerlabError as error:
        warnings.warn(f"What is published of {paper.strategy} is left out: {error}", LayerlabWarning, stacklevel=3)
        return {}
    return {folder: [row.model_copy(update={"mlflow_run": ""}) for row in rows]
            for folder, rows in kept.items() if rows}


def _outcome(paper: Paper, run: Any, rows: Sequence[ClaimResult]) -> Outcome:
    """What a run in MLflow left; its rows say whether the plugin's code has changed since, where the run noted it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tracking.download_some(run.info.run_id, (IDENTITY, ANSWERS_FILE, f"tables/{PAYS}.csv"), folder)
        older = (folder / IDENTITY).exists() and bool(age(folder, paper).numbers)
        return outcome(folder, [row.model_copy(update={"older": older}) for row in rows])


def collect(names: Sequence[str] = ()) -> list[ClaimResult]:
    """The rows of `collected`, of all papers."""
    return all_rows(collected(names))


def all_rows(found: Sequence[Collected]) -> list[ClaimResult]:
    """The rows of several papers, in their order."""
    return [row for each in found for row in each.rows]


def run_table(results: Sequence[ClaimResult]) -> Table:
    """The runs behind a scoreboard, one row a run: paper, profile, machine, commit, address in MLflow's UI, or that
    it is published."""
    rows: dict[str, list[str | Cell]] = {}
    experiments: dict[str, str] = {}
    for result in results:
        if not result.mlflow_run and result.verdict != "not run":
            name = f"{result.paper} {result.profile} {result.result}"
            rows.setdefault(name, [result.paper, result.profile, result.machine, result.commit,
                                   f"published: results/{result.paper}"])
        if result.mlflow_run and result.mlflow_run not in rows:
            if result.paper not in experiments:
                found = tracking.found_experiment(result.paper)
                experiments[result.paper] = found.experiment_id if found is not None else ""
            address = tracking.run_url(experiments[result.paper], result.mlflow_run)
            rows[result.mlflow_run] = [result.paper, result.profile, result.machine, result.commit,
                                       Cell(address, link=address)]
    return Table(("paper", "profile", "machine", "commit", "run"), list(rows.values()))


def together(found: Sequence[Collected]) -> str:
    """What several papers' comparisons say together; empty where there are none."""
    return overall(each.found for each in found) if len(found) > 1 else ""


def sentences(found: Sequence[Collected]) -> str:
    """What papers say together, and the sentence of each in a list, in Markdown."""
    lines = "\n".join(f"- {markdown_line(each.paper, each.line)}" for each in found)
    return "\n\n".join(filter(None, [markdown_text(together(found)), lines]))


def board(found: Sequence[Collected], markdown: bool = False, colour: bool = False) -> str:
    """What papers say together and each by itself, then of each its claims, then the runs behind them, for a terminal
    or in Markdown.

    Args:
        found: of `collected`.
        markdown: or text.
        colour: of text, as `Table.text` has it.
    """
    rows = all_rows(found)
    if markdown:
        parts = [sentences(found)]
        for each in found:
            parts += [f"## {each.paper.strategy}", claims_table(each.rows).markdown()]
        return "\n\n".join([*parts, "## Runs", run_table(rows).markdown()])
    width = shutil.get_terminal_size((100, 24)).columns
    parts = [wrapped(line, width) for line in (together(found), *(each.line for each in found)) if line]
    for each in found:
        table = replace(claims_table(each.rows, wide=width >= _WIDE), caption=f"── {each.paper.strategy} ──")
        parts.append(table.text(colour=colour))
    return "\n\n".join([*parts, run_table(rows).text(colour=colour)])


def wrapped(line: str, width: int) -> str:
    """A sentence in lines, each but the first one indented; a number stays with its interval and its unit."""
    lines = textwrap.fill(unbroken(printable(line)), width, subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def page(found: Sequence[Collected]) -> str:
    """The scoreboard and its runs as an HTML page that needs nothing else: a claim a line, to be filtered and sorted.

    Args:
        found: of `collected`.
    """
    import pandas as pd
    from itables import options, to_html_datatable
    from itables.javascript import generate_init_offline_itables_html

    results = all_rows(found)
    lines = [{"paper": line.paper, "state": line.state, "claim": line.claim, "where": line.where,
              "published": line.published, "measured": unbroken(line.measured), "÷ published": line.share,
              "verdict": line.verdict, "why": line.why} for line in claim_lines(results)]
    frame = pd.DataFrame(lines, columns=["paper", "state", "claim", "where", "published", "measured", "÷ published",
                                         "verdict", "why"])
    table = to_html_datatable(
        frame.map(printable), connected=False, showIndex=False, paging=False, classes="display compact wrap",
        columnControl=["order", ["searchList"]], ordering={"indicators": False, "handler": False},
        layout={"topStart": "info", "topEnd": "search", "bottomStart": None, "bottomEnd": None}, maxBytes=0,
        style="width:100%; max-width:100%", display_logo_when_loading=False)
    said = "".join(f"<li>{_html_line(each)}</li>" for each in found)
    overall_line = together(found)
    first = f"<p>{html.escape(unbroken(overall_line))}</p>" if overall_line else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>layerlab: scoreboard</title><style>{_STYLE}</style>'
        f"{generate_init_offline_itables_html(options.dt_bundle)}</head><body><h1>Scoreboard</h1>{first}<ul>{said}</ul>"
        f'<div class="wide">{table}</div><h2>Runs</h2><div class="wide">{run_table(results).html()}</div></body>'
        "</html>\n"
    )


def _html_line(of: Collected) -> str:
    name, rest = (html.escape(part) for part in parted(of.paper, printable(of.line)))
    return f"<strong>{name}</strong>{unbroken(rest)}"
