"""The scoreboard: every claim with what was measured of it, as a table for a terminal, a page or a notebook."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import click
import pandas as pd
from pydantic import ValidationError

from layerlab.base.errors import LayerlabWarning, first_line
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper, load_paper, readable_papers
from layerlab.contract.rows import SCOREBOARD, completed, scoreboard
from layerlab.contract.rows import tally as tally
from layerlab.runs import tracking
from layerlab.show.table import markdown_table

COLOURS = {"reproduced": "green", "holds": "cyan", "differs": "yellow", "not": "bright_black"}


def scoreboard_text(results: Sequence[ClaimResult], width: int = 120) -> str:
    """The scoreboard for a terminal of that many columns, verdicts in colour."""
    frame = scoreboard(results)
    fixed = {"where": 9, "paper": 11, "measured": 15, "run": 18, "verdict": 24}
    widths = {"claim": max(24, width - sum(fixed.values()) - 2 * len(fixed))} | fixed
    lines = ["  ".join(click.style(name.ljust(size), bold=True) for name, size in widths.items())]
    for _, row in frame.iterrows():
        cells = {name: textwrap.wrap(str(row[name]), size) or [""] for name, size in widths.items()}
        colour = COLOURS[str(row["verdict"]).split()[0]]
        for line in range(max(len(cell) for cell in cells.values())):
            parts = []
            for name, size in widths.items():
                text = (cells[name][line] if line < len(cells[name]) else "").ljust(size)
                parts.append(click.style(text, fg=colour) if name == "verdict" else text)
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def scoreboard_markdown(results: Sequence[ClaimResult]) -> str:
    """The scoreboard as a Markdown table."""
    return markdown_table(SCOREBOARD, scoreboard(results).to_numpy()) + "\n"


def scoreboard_styled(results: Sequence[ClaimResult]) -> Any:
    """The scoreboard as a pandas Styler, for a notebook or, by its `to_html`, a page; verdicts in colour."""
    paint = {"reproduced": "#c7e9c0", "holds": "#c6dbef", "differs": "#fdd0a2", "not": "#eeeeee"}
    style = scoreboard(results).style.hide(axis="index").format(escape="html")
    style = style.map(lambda text: f"background-color: {paint[str(text).split()[0]]}", subset=["verdict"])
    return style.set_properties(**{"text-align": "left", "vertical-align": "top"})


def _rows(paper: Paper, run: Any) -> list[ClaimResult]:
    """What a run says of its own paper's claims; whatever else its plugin may have written there is left out."""
    name = paper.strategy
    try:
        rows = [ClaimResult.model_validate_json(row) for row in tracking.claim_rows(run)]
    except ValidationError as error:
        warnings.warn(f"The run {run.info.run_id} of {name} is left out: its claims cannot be read "
                      f"({first_line(error)}).", LayerlabWarning, stacklevel=3)
        return []
    return [paper.judged(row) for row in rows if row.paper == name]


def collect(names: Sequence[str] = ()) -> list[ClaimResult]:
    """Every claim of papers with what MLflow holds of it: the newest finished run of each profile.

    Args:
        names: strategies; default: all that are installed, but for those without a readable paper, each with a warning.

    Raises:
        LayerlabError: an unknown strategy; a tracking database that cannot be read.
    """
    rows = []
    for paper in [load_paper(name) for name in names] or readable_papers():
        results: list[ClaimResult] = []
        newest = set()
        for run in tracking.notebook_runs(paper.strategy):
            profile = run.data.tags.get("profile", "")
            if profile not in newest:
                newest.add(profile)
                results += _rows(paper, run)
        rows += completed(paper, results)
    return rows


RUNS = ("paper", "profile", "machine", "commit", "run")


def run_table(results: Sequence[ClaimResult]) -> pd.DataFrame:
    """The runs behind a scoreboard, a row each: paper, profile, machine, commit, address in the UI."""
    rows = {}
    for result in results:
        if result.mlflow_run and result.mlflow_run not in rows:
            number = tracking.experiment_id(result.paper)
            rows[result.mlflow_run] = (result.paper, result.profile, result.machine, result.commit,
                                       tracking.run_url(number, result.mlflow_run))
    return pd.DataFrame(list(rows.values()), columns=list(RUNS))


def page(results: Sequence[ClaimResult], runs: pd.DataFrame) -> str:
    """The scoreboard and its runs as an HTML page that needs nothing else."""
    linked = runs.style.hide(axis="index").format(hyperlinks="html").set_properties(**{"text-align": "left"})
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>layerlab: scoreboard</title><style>'
        "body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em } "
        "table { border-collapse: collapse } th, td { border-bottom: 1px solid #ddd; padding: .35em .6em } "
        "th { text-align: left }</style></head><body><h1>Scoreboard</h1>"
    )
    return f"{head}{scoreboard_styled(results).to_html()}<h2>Runs</h2>{linked.to_html()}</body></html>\n"
