"""Every arm of a comparison against the baseline, and those that no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from layerlab.base.arguments import validated
from layerlab.show.interval import signed, spread
from layerlab.show.table import Table
from layerlab.training.results import BASELINE, Comparison

# Column → heading: differences in points, and ratios.
POINTS = {"top-1": "top-1 [points]", "equal cost": "at equal cost [points]", "placebo": "against the placebo [points]"}
RATIOS = {"seconds": "time [×]", "TFLOP": "compute [×]", "GB moved": "moved [×]", "peak MB": "peak memory [×]"}


@validated
def against(comparison: Comparison, baseline: str = BASELINE) -> pd.DataFrame:
    """Every arm against the baseline, seed by seed.

    Returns:
        A row an arm: `top-1` (difference in points), `seconds`, `TFLOP`, `GB moved`, `peak MB` (ratios), each a mean
        with its half-width as `column ±`; where they were trained, `equal cost` and `placebo`, the difference in points
        to plain training of the same cost, with the verdict as `pays`, and to the strategy's placebo; and `left out`,
        the reason of an arm that has no numbers.
    """
    rows: list[dict[str, Any]] = []
    for arm in comparison.given.arms:
        if arm == baseline:
            continue
        row: dict[str, Any] = {"arm": arm}
        for column in ("top-1", *RATIOS):
            row[column], row[f"{column} ±"] = comparison.paired(column, arm, baseline).interval
        if arm in comparison.equal:
            pays = comparison.pays(arm)
            row["equal cost"], row["equal cost ±"] = pays.points.interval
            row["pays"] = pays.verdict
        if arm in comparison.placebos:
            row["placebo"], row["placebo ±"] = comparison.paired("top-1", arm, comparison.placebos[arm]).interval
        rows.append(row | {"left out": ""})
    rows += [{"arm": arm, "left out": reason} for arm, reason in comparison.failures.items()]
    return pd.DataFrame(rows)


@validated
def against_table(comparison: Comparison, baseline: str = BASELINE) -> Table:
    """`against`, to be read."""
    frame = against(comparison, baseline)
    every = {"top-1": POINTS["top-1"], **RATIOS, **POINTS, "pays": "pays"}
    headings = {column: heading for column, heading in every.items() if column in frame}
    rows = []
    for _, row in frame.iterrows():
        if row["left out"]:
            rows.append([row["arm"], f"left out: {row['left out']}"])
        else:
            rows.append([row["arm"], *(_cell(row, column) for column in headings)])
    seeds = len(comparison.seeds)
    return Table(["against the baseline", *headings.values()], rows, "one seed" if seeds == 1 else
                 f"{seeds} seeds: mean ± 95 % interval of differences and ratios, seed by seed")


def _cell(row: pd.Series, column: str) -> str:
    if column == "pays":
        return row[column] if isinstance(row[column], str) else "—"
    interval = row[column], row[f"{column} ±"]
    return signed(interval) if column in POINTS else spread(*interval)


def payoff(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """Does a method beat plain training of the same cost, and its placebo? For the table of a paper's notebook.

    Args:
        runs: name → comparison, with `equal` or `placebo`.

    Returns:
        A row an arm that was judged, as texts: `run`, `arm`, `pays` (yes, no or undecided), `top-1 [%]`; of plain
        training of the same cost its length as a share of the baseline's steps, its top-1 and how many points the arm
        is above it, the same of the placebo, seed by seed, with 95 % intervals; and the number of `seeds`.
    """
    rows = []
    for name, comparison in runs.items():
        for arm in dict.fromkeys((*comparison.equal, *comparison.placebos)):
            row: dict[str, Any] = {"run": name, "arm": arm, "pays": "", "top-1 [%]": _top1(comparison, arm)}
            if arm in comparison.equal:
                pays = comparison.pays(arm)
                row |= {"pays": pays.verdict, "equal cost, steps": f"{100 * pays.length:.0f} %",
                        "equal cost, top-1 [%]": _top1(comparison, comparison.equal[arm]),
                        "above it [points]": signed(pays.points.interval)}
            if arm in comparison.placebos:
                placebo = comparison.placebos[arm]
                row |= {"placebo, top-1 [%]": _top1(comparison, placebo),
                        "above the placebo [points]": signed(comparison.paired("top-1", arm, placebo).interval)}
            rows.append(row | {"seeds": len(comparison.seeds)})
    return pd.DataFrame(rows).fillna("")


def _top1(comparison: Comparison, arm: str) -> str:
    return spread(*comparison.estimate("top-1", arm).interval)


def margins(runs: Mapping[str, Comparison]) -> pd.DataFrame:
    """The points of `payoff`, for `figures.margins`.

    Returns:
        A row a run, arm, seed and what the arm is held `against`: `points` of top-1 that it is above that. `title` is
        the arm's name with its answer.
    """
    rows = []
    for name, comparison in runs.items():
        for against, companions in (("plain training of the same cost", comparison.equal),
                                    ("its placebo", comparison.placebos)):
            for arm, companion in companions.items():
                answer = f", pays: {comparison.pays(arm).verdict}" if arm in comparison.equal else ""
                points = comparison.paired("top-1", arm, companion).values
                rows += [{"run": name, "title": f"{name}: {arm}{answer}", "arm": arm, "seed": seed, "against": against,
                          "points": value} for seed, value in zip(comparison.seeds, points, strict=True)]
    return pd.DataFrame(rows, columns=["run", "title", "arm", "seed", "against", "points"])


def pareto_front(frame: pd.DataFrame, cost: str, value: str) -> list[str]:
    """The arms that no other beats: none costs at most as much and reaches at least as much, one of both for less.

    Args:
        frame: a row an arm, `Comparison.summary` say, with `arm` and both columns.
        cost: less is better.
        value: more is better.

    Returns:
        Their names in the frame's order; an arm without a number is not among them.
    """
    points = [(row["arm"], row[cost], row[value]) for _, row in frame.iterrows()
              if math.isfinite(row[cost]) and math.isfinite(row[value])]
    return [
        arm for arm, spent, reached in points
        if not any(less <= spent and more >= reached and (less < spent or more > reached) for _, less, more in points)
    ]
