"""The scoreboard: every claim with what was measured of it, as a table for a terminal, a page or a notebook."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from layerlab.base.errors import LayerlabWarning, first_problem
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper, load_paper, readable_papers
from layerlab.contract.rows import SCOREBOARD, completed, scoreboard_texts, sentence
from layerlab.contract.rows import tally as tally
from layerlab.runs import tracking
from layerlab.show.table import Cell, Table, Tone

# First word of a verdict → how its cell looks.
VERDICT_TONES: dict[str, Tone] = {
    "reproduced": "good", "holds": "good", "weaker": "fair", "undecided": "faint", "differs": "warning",
    "opposite": "warning", "not": "faint", "by": "faint",
}


def verdict_cell(verdict: str) -> Cell:
    """A verdict in its colour, with its reason or without it."""
    return Cell(verdict, VERDICT_TONES.get(verdict.split()[0], ""))


def scoreboard_table(results: Sequence[ClaimResult]) -> Table:
    """The scoreboard: one row a claim, published beside measured, verdicts in colour."""
    rows = [[verdict_cell(text) if name == "verdict" else text for name, text in row.items()]
            for row in scoreboard_texts(results)]
    return Table(SCOREBOARD, rows)


def brief_table(results: Sequence[ClaimResult]) -> Table:
    """The scoreboard in four columns, for a terminal: claim, published, measured, verdict without its reason."""
    rows: list[list[str | Cell]] = []
    for texts, result in zip(scoreboard_texts(results), results, strict=True):
        rows.append([texts["claim"], texts["paper"], texts["measured"], verdict_cell(result.verdict)])
    return Table(("claim", "paper", "measured", "verdict"), rows)


def sentences(results: Sequence[ClaimResult]) -> list[str]:
    """One line for each paper: what its rows say, what they cannot say and why."""
    papers = dict.fromkeys(row.paper for row in results)
    return [sentence(paper, [row for row in results if row.paper == paper]) for paper in papers]


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


def collect(names: Sequence[str] = ()) -> list[ClaimResult]:
    """Every claim of papers with what MLflow holds of it: the newest finished run of each profile, and of each set of
    parameters that is not the profile's.

    Args:
        names: strategies; default: all that are installed, but for those without a readable paper, each with a warning.

    Raises:
        LayerlabError: an unknown strategy; a tracking database that cannot be read.
    """
    # What could not be logged when it was finished belongs to it.
    tracking.send_unsent(tracking.unsent_files())
    rows = []
    for paper in [load_paper(name) for name in names] or readable_papers():
        results: list[ClaimResult] = []
        newest = set()
        for run in tracking.notebook_runs(paper.strategy):
            said = _rows(paper, run)
            # The same experiment is told by what was set, not by the code, which changes from day to day.
            changed = next((row.changed for row in said if row.changed), {})
            which = run.data.tags.get("profile", ""), json.dumps(changed, sort_keys=True)
            if which not in newest:
                newest.add(which)
                results += said
        rows += completed(paper, results)
    return rows


def run_table(results: Sequence[ClaimResult]) -> Table:
    """The runs behind a scoreboard, one row a run: paper, profile, machine, commit, address in MLflow's UI."""
    rows: dict[str, list[str | Cell]] = {}
    experiments: dict[str, str] = {}
    for result in results:
        if result.mlflow_run and result.mlflow_run not in rows:
            if result.paper not in experiments:
                found = tracking.found_experiment(result.paper)
                experiments[result.paper] = found.experiment_id if found is not None else ""
            address = tracking.run_url(experiments[result.paper], result.mlflow_run)
            rows[result.mlflow_run] = [result.paper, result.profile, result.machine, result.commit,
                                       Cell(address, link=address)]
    return Table(("paper", "profile", "machine", "commit", "run"), list(rows.values()))


def page(results: Sequence[ClaimResult]) -> str:
    """The scoreboard and its runs as an HTML page that needs nothing else."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>layerlab: scoreboard</title><style>'
        "body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em } "
        "table { border-collapse: collapse } th, td { border-bottom: 1px solid #ddd; padding: .35em .6em }"
        "</style></head><body><h1>Scoreboard</h1>"
    )
    return f"{head}{scoreboard_table(results).html()}<h2>Runs</h2>{run_table(results).html()}</body></html>\n"
