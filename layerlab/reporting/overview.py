"""The figure of all papers: what each method costs and gains, beside what costs the same without its idea."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layerlab.base.files import write_atomically
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper
from layerlab.reporting.bottom_line import kept_outcomes
from layerlab.reporting.findings import Finding, called, finding
from layerlab.reporting.wording import EQUAL, PLACEBO

# Name of the figure's and its numbers' files.
OVERVIEW = "overview"
ALTERNATIVE = "Accuracy against cost of every method, with plain training of the same cost and the placebo"
CAPTION = (
    "A method pays where its point lies above the square of plain training that costs the same; where the square is as "
    "high, stopping earlier does as well. Bars are 95 % intervals."
)
NOTHING_YET = "No method was measured with today's code yet; a figure of all of them follows the first published run."
QUICK_NOTE = "The quick profile on digits, which settles nothing"
COLUMNS = ("method", "tone", "cost", "kind", "x", "x ±", "y", "y ±")
METHOD = "method"
# Costs that plain training can be given, too.
_BOUGHT = ("time", "compute")


def overview(papers: Iterable[tuple[Paper, Mapping[Path, Sequence[ClaimResult]]]]) -> pd.DataFrame:
    """The points of `layerlab.show.overview.overview`.

    Args:
        papers: each with its runs' rows, by folder; those count that count for its sentence. A paper's place among
            all is its colour, whether it has a point or not.

    Returns:
        A row a point, with the columns of `COLUMNS`: the cost as a share of what it is without the method, points of
        accuracy above that; no `y` where the paper's headline has no accuracy.
    """
    rows: list[dict[str, Any]] = []
    for tone, (paper, runs) in enumerate(papers):
        if paper.headline is not None:
            rows += [{"tone": tone, **point} for point in _points(finding(paper, kept_outcomes(runs)))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _points(found: Finding) -> list[dict[str, Any]]:
    places = [found, *found.elsewhere]
    return [point for each in places for point in _points_at(each, called(each, several=len(places) > 1))]


def _points_at(found: Finding, method: str) -> list[dict[str, Any]]:
    y, spread = found.points or (math.nan, math.nan)
    rows = []
    for cost, (x, half) in {**found.costs, **found.beside}.items():
        about = {"method": method, "cost": cost}
        rows.append({**about, "kind": METHOD, "x": x, "x ±": half, "y": y, "y ±": spread})
        if found.equal and cost in _BOUGHT:
            # The interval is of the difference, so that it stands at the companion alone.
            above, uncertain = found.equal.points
            rows.append({**about, "kind": EQUAL, "x": x, "x ±": math.nan, "y": y - above, "y ±": uncertain})
        if found.placebo:
            above, uncertain = found.placebo.points
            rows.append({**about, "kind": PLACEBO, "x": x, "x ±": math.nan, "y": y - above, "y ±": uncertain})
    return rows


def keep_overview(folder: Path, points: pd.DataFrame, note: str = "") -> Path:
    """Draw the figure into a folder, with its numbers beside it.

    Args:
        folder: an existing one.
        points: of `overview`.
        note: a line above the figure, such as what its numbers settle.

    Returns:
        The picture's file.
    """
    from layerlab.show.canvas import png
    from layerlab.show.overview import overview as draw

    picture = png(draw(points, (METHOD, EQUAL, PLACEBO), note), 144)
    numbers = points.to_csv(index=False, float_format="%.6g").encode()
    write_atomically(folder / f"{OVERVIEW}.csv", lambda stream: stream.write(numbers))
    write_atomically(folder / f"{OVERVIEW}.png", lambda stream: stream.write(picture))
    return folder / f"{OVERVIEW}.png"
