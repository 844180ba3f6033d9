"""What is kept among the results, as it stands today: judged by today's rules and held against today's code."""

from __future__ import annotations

from pathlib import Path

from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper
from layerlab.contract.rows import completed
from layerlab.reporting.freshness import age
from layerlab.runs.record import PARAMETERS, RESULTS, read_parameters, read_results


def kept_profiles(folder: Path, paper: Paper) -> dict[Path, list[ClaimResult]]:
    """What is kept of a paper, by the folder of each run, with the verdicts that the values have today."""
    return {file.parent: run_rows(file.parent, paper) for file in sorted(folder.glob(f"[!.]*/{RESULTS}"))}


def run_rows(folder: Path, paper: Paper) -> list[ClaimResult]:
    """The rows in a run's folder as they stand today: judged anew, and held against the profile's parameters and the
    plugin's code.

    Raises:
        LayerlabError: what the folder holds cannot be read.
    """
    older = bool(age(folder, paper).numbers)
    rows = [row.model_copy(update={"older": older}) for row in read_results(folder)]
    if not (folder / PARAMETERS).exists():
        return [paper.judged(row) for row in rows]
    parameters = read_parameters(folder)
    return [paper.placed(row, parameters) for row in rows]


def kept(target: Path, paper: Paper) -> list[ClaimResult]:
    """A paper's claims in its order: what is kept of each, or a row that says `not run`.

    Raises:
        LayerlabError: what is kept cannot be read.
    """
    folder = target / paper.strategy
    return completed(paper, read_results(folder) if (folder / RESULTS).exists() else ())
