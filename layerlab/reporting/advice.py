"""Which strategy to use, by the numbers of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from layerlab.show.interval import spread
from layerlab.show.table import Table
from layerlab.training.results import BASELINE, Comparison

# Costs that a strategy may save: what for → column of `Comparison.runs`.
COSTS = {"time": "seconds", "compute": "TFLOP", "memory": "peak MB"}
# A ratio nearer to 1 than this is rounding.
_EXACT = 1e-6
# What a saving has to be, for a strategy to be worth it: the order in which arms take turns alone makes some per cent.
WORTH = 0.05


def against(comparison: Comparison, baseline: str = BASELINE) -> pd.DataFrame:
    """Every arm against the baseline, seed by seed.

    Returns:
        A row an arm: `top-1` (difference in points), `seconds`, `TFLOP`, `GB moved`, `peak MB` (ratios), each a mean
        with its half-width as `column ±`; and `left out`, the reason of an arm that has no numbers.
    """
    rows: list[dict[str, Any]] = []
    for arm in comparison.arms:
        if arm == baseline:
            continue
        row: dict[str, Any] = {"arm": arm}
        for column in ("top-1", "seconds", "TFLOP", "GB moved", "peak MB"):
            row[column], row[f"{column} ±"] = comparison.paired(column, arm, baseline).interval
        rows.append(row | {"left out": ""})
    rows += [{"arm": arm, "left out": reason} for arm, reason in comparison.failures.items()]
    return pd.DataFrame(rows)


def against_table(comparison: Comparison, baseline: str = BASELINE) -> Table:
    """`against`, to be read."""
    headings = {"top-1": "top-1 [points]", "seconds": "time [×]", "TFLOP": "compute [×]", "GB moved": "moved [×]",
                "peak MB": "peak memory [×]"}
    rows = []
    for _, row in against(comparison, baseline).iterrows():
        if row["left out"]:
            rows.append([row["arm"], f"left out: {row['left out']}"])
            continue
        values = {column: (row[column], row[f"{column} ±"]) for column in headings}
        rows.append([row["arm"], *(_signed(value) if column == "top-1" else spread(*value)
                                   for column, value in values.items())])
    seeds = len(comparison.seeds)
    return Table(["against the baseline", *headings.values()], rows, "one seed" if seeds == 1 else
                 f"{seeds} seeds: mean ± 95 % interval of differences and ratios, seed by seed")


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


@dataclass(frozen=True)
class Advice:
    """Which strategy to use, by the numbers of a comparison.

    Attributes:
        choices: `accuracy`, `time`, `compute`, `memory` → the arms that are best for it; several where the numbers do
            not tell them apart; none where none is measurably better than the baseline.
        sentences: the answer, and for each of these what it rests on.
    """

    choices: dict[str, tuple[str, ...]]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        first, *rest = map(html.escape, self.sentences)
        return f"<p><b>{first}</b></p>" + "".join(f"<p>{sentence}</p>" for sentence in rest)


def advise(
    comparison: Comparison, baseline: str = BASELINE, tolerance: float = 1.0, test_images: int | None = None
) -> Advice:
    """Which strategy to use: for accuracy, and for less time, compute or memory at an accuracy that is kept.

    An arm is better in something when the whole 95 % interval of its difference to the baseline, or of its ratio, taken
    seed by seed, says so; a saving has to be `WORTH` besides. It keeps the accuracy when the whole interval is above a
    loss of `tolerance`. Two arms are told apart when the interval of one against the other says so.

    Args:
        tolerance: points of top-1 that may be lost.
        test_images: how many top-1 comes from: no interval of it is taken to be narrower than one of them, since a few
            seeds may agree by chance.
    """
    arms = [arm for arm in comparison.arms if arm != baseline]
    nothing: dict[str, tuple[str, ...]] = dict.fromkeys(("accuracy", *COSTS), ())
    if not arms:
        return Advice(nothing, ("There is nothing to choose from: no strategy was trained to the end.",))
    if len(comparison.seeds) < 2:
        return Advice(nothing, (
            "Nothing can be told apart: one seed says nothing about how much results vary by chance. Compare with at "
            "least three, seeds=[0, 1, 2].",))
    finest = 100 / test_images if test_images else 0.0
    measured = {arm: comparison.paired("top-1", arm, baseline).interval for arm in arms}
    points = {arm: (mean, max(half, finest)) for arm, (mean, half) in measured.items()}
    choices, details = dict(nothing), []
    choices["accuracy"], sentences = _most_accurate(comparison, points)
    details += sentences
    dearer = _dearer(comparison, baseline, arms)
    for goal, column in COSTS.items():
        choices[goal], sentence = _cheapest(comparison, goal, column, baseline, points, tolerance, dearer)
        details.append(sentence)
    return Advice(choices, (_headline(choices, tolerance), *details))


def _most_accurate(
    comparison: Comparison, points: Mapping[str, tuple[float, float]]
) -> tuple[tuple[str, ...], list[str]]:
    """The arms measurably above the baseline that are not told apart from the best, and what to say of accuracy."""
    better = [arm for arm, (mean, half) in points.items() if mean - half > 0]
    worse = [arm for arm, (mean, half) in points.items() if mean + half < 0]
    chosen: tuple[str, ...] = ()
    sentences = ["Accuracy: no strategy is measurably above the baseline."]
    if better:
        best = max(better, key=lambda arm: points[arm][0])
        chosen = (best, *(arm for arm in better if arm != best and _includes(
            comparison.paired("top-1", best, arm).interval, 0.0)))
        sentences = [f"Accuracy: {_listed({arm: f'{_signed(points[arm])} points of top-1' for arm in chosen})}."]
    if worse:
        below = ", ".join(f"{arm} ({_signed(points[arm])} points)" for arm in worse)
        sentences.append(f"Measurably less accurate than the baseline: {below}.")
    return chosen, sentences


def _cheapest(
    comparison: Comparison, goal: str, column: str, baseline: str, points: Mapping[str, tuple[float, float]],
    tolerance: float, dearer: Mapping[str, str],
) -> tuple[tuple[str, ...], str]:
    """The arms that are measurably cheaper, keep the accuracy and are not told apart from the cheapest, in words."""
    ratios = {arm: comparison.paired(column, arm, baseline).interval for arm in points}
    cheaper = [arm for arm, (mean, half) in ratios.items() if mean + half < 1 - _EXACT and mean <= 1 - WORTH]
    if not cheaper:
        return (), f"Less {goal}: no strategy is measurably below the baseline by {100 * WORTH:g} % or more."
    told = {arm: f"{spread(*ratios[arm])} of the baseline's at {_signed(points[arm])} points of top-1{dearer[arm]}"
            for arm in cheaper}
    candidates = [arm for arm in cheaper if points[arm][0] - points[arm][1] >= -tolerance]
    if not candidates:
        below = ", ".join(f"{arm} ({told[arm]})" for arm in cheaper)
        return (), f"Less {goal}: {below}; but a loss of more than {_points(tolerance)} of top-1 is not excluded."
    best = min(candidates, key=lambda arm: ratios[arm][0])
    chosen = (best, *(arm for arm in candidates if arm != best and _includes(
        comparison.paired(column, best, arm).interval, 1.0)))
    return chosen, f"Less {goal}: {_listed({arm: told[arm] for arm in chosen})}."


def _dearer(comparison: Comparison, baseline: str, arms: Sequence[str]) -> dict[str, str]:
    """What each arm measurably takes more of than the baseline, in words that follow a price."""
    told = {}
    for arm in arms:
        more = []
        for goal, column in COSTS.items():
            mean, half = comparison.paired(column, arm, baseline).interval
            if mean - half > 1 + _EXACT:
                more.append(f"{spread(mean, half)} times the {goal}")
        told[arm] = f", for {_and(more)}" if more else ""
    return told


def _headline(choices: Mapping[str, tuple[str, ...]], tolerance: float) -> str:
    wanted = {"accuracy": "accuracy"} | {goal: f"less {goal}" for goal in COSTS}
    found: dict[tuple[str, ...], list[str]] = {}
    for goal, chosen in choices.items():
        if chosen:
            found.setdefault(chosen, []).append(wanted[goal])
    if not found:
        return ("Stay with the baseline: no strategy is measurably more accurate, and none is measurably cheaper with "
                f"a loss of more than {_points(tolerance)} of top-1 excluded.")
    text = "; ".join(f"{' or '.join(chosen)} for {_and(goals)}" for chosen, goals in found.items())
    missing = [wanted[goal] for goal, chosen in choices.items() if not chosen]
    return f"Use {text}." + (f" For {_and(missing)} nothing can be recommended over the baseline." if missing else "")


def _includes(interval: tuple[float, float], value: float) -> bool:
    mean, half = interval
    return mean - half <= value <= mean + half


def _signed(interval: tuple[float, float]) -> str:
    text = spread(*interval)
    return text if text.startswith("-") else f"+{text}"


def _points(count: float) -> str:
    return f"{count:g} point{'s' * (count != 1)}"


def _and(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _listed(told: Mapping[str, str]) -> str:
    text = " or ".join(f"{arm} ({what})" for arm, what in told.items())
    return text + (", which the numbers do not tell apart" if len(told) > 1 else "")
