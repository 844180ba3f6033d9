"""What runs of a paper found of the numbers that its headline names: the source of its sentence and of its point in the
figure of all papers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerlab.base.errors import LayerlabError
from layerlab.base.files import is_plain
from layerlab.contract.claims import Claim, ClaimResult
from layerlab.contract.headline import Cost, Headline, ratio
from layerlab.contract.paper import Paper
from layerlab.runs.answer import ANSWERS_FILE, Against, Answer, answers_of, read_answers
from layerlab.runs.record import RECORD, read_record
from layerlab.show.interval import mean_interval

# (mean, half-width of the 95 % interval, NaN for one seed).
Interval = tuple[float, float]
PAYS = "pays"
_NUMBER = re.compile(r"([+-]?\d[\d,]*\.?\d*)(?: ± (\d[\d,]*\.?\d*))?")
_NOWHERE = ("not run", "by a model")
# Beside the costs, what a headline tells.
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Outcome:
    """What one run of a paper left.

    Attributes:
        rows: its claims, as they are judged today.
        pays: the rows of its table `pays`, as `explore.payoff` makes it; none where it has no such table.
        arms: of its comparisons against their baselines.
    """

    rows: Sequence[ClaimResult]
    pays: Sequence[Mapping[str, str]] = ()
    arms: Sequence[Against] = ()


@dataclass(frozen=True)
class Companion:
    """Something that an arm is held against: plain training of the same cost, or its placebo.

    Attributes:
        points: of top-1 that the arm is above it.
        length: its steps as a share of the baseline's; None for a placebo, which costs what the arm costs.
    """

    points: Interval
    length: float | None = None


@dataclass(frozen=True)
class Finding:
    """What is known of a paper's headline.

    Attributes:
        paper: the paper.
        anchor: the row whose run and data the numbers are of; None where nothing was measured.
        points: of accuracy that the method is above what is used without it; None where it was not measured.
        costs: cost → its share of what it is without the method.
        unsettled: cost, or `accuracy` → why its claim says nothing, which a gate of its own closes.
        beside: the same of costs without a claim, against training without the method.
        equal: plain training of the same cost; None where it was not compared.
        placebo: the method's placebo; None where it has none, or was not compared.
        elsewhere: the same on other data and networks whose gates are open, so that none is told instead of another.
    """

    paper: Paper
    anchor: ClaimResult | None = None
    points: Interval | None = None
    costs: dict[Cost, Interval] = field(default_factory=dict)
    unsettled: dict[str, str] = field(default_factory=dict)
    beside: dict[Cost, Interval] = field(default_factory=dict)
    equal: Companion | None = None
    placebo: Companion | None = None
    elsewhere: tuple[Finding, ...] = ()


def called(found: Finding, several: bool) -> str:
    """What a method is called among others: with its data, where it stands there several times."""
    assert found.paper.headline is not None
    method = found.paper.headline.method
    return f"{method} on {found.anchor.conditions.get('dataset', '')}" if several and found.anchor else method


def outcome(folder: Path, rows: Sequence[ClaimResult]) -> Outcome:
    """What a run's folder holds; what cannot be read there counts as absent.

    Args:
        folder: of a run, or of a profile that is kept.
        rows: its claims.
    """
    table = folder / "tables" / f"{PAYS}.csv"
    pays: list[dict[str, str]] = []
    if is_plain(table):
        text = table.read_text(encoding="utf-8", errors="replace")
        pays = [{name: value for name, value in row.items() if isinstance(value, str)}
                for row in csv.DictReader(io.StringIO(text))]
    return Outcome(rows, pays, [arm for answer in run_answers(folder) for arm in answer.arms])


def run_answers(folder: Path) -> list[Answer]:
    """What a run's comparisons measured, from its folder or from where it is kept; nothing where it cannot be read."""
    found: list[Answer] = []
    if is_plain(folder / ANSWERS_FILE):
        found = read_answers(folder / ANSWERS_FILE)
    elif is_plain(folder / RECORD):
        found = answers_of(read_record(folder))
    return [answer for answer in found if answer.arms]


def finding(paper: Paper, runs: Iterable[Outcome]) -> Finding:
    """What runs say of a paper's headline.

    Of several runs, datasets and networks those come first whose gates are open, then the ones nearest to the paper's
    conditions, with the most seeds and the most images; never the ones with the best outcome. What was measured on
    other data or another network follows, where its gates are open.

    Args:
        paper: with a headline.
        runs: with the profiles' own parameters and today's code.

    Raises:
        LayerlabError: the paper has no headline.
    """
    headline = paper.headline
    if headline is None:
        raise LayerlabError(f"{paper.strategy!r} has no headline; give its paper.toml one.")
    runs = list(runs)
    anchor, run = _nearest(paper, [*headline.accuracy, *filter(None, headline.costs.values())], runs)
    if anchor is None or run is None:
        return Finding(paper)
    others = [_at(paper, row, of, ()) for row, of in _elsewhere(paper, anchor, runs)]
    return replace(_at(paper, anchor, run, runs), elsewhere=tuple(others))


def _at(paper: Paper, anchor: ClaimResult, run: Outcome, runs: Sequence[Outcome]) -> Finding:
    """What is known where a row was measured.

    Args:
        paper: with a headline.
        anchor: the row.
        run: its run.
        runs: where claims are looked for that were not measured beside the anchor.
    """
    headline = paper.headline
    assert headline is not None
    rows: dict[str, ClaimResult] = {}
    # The anchor's own number before that of another dataset.
    accuracy = [anchor.claim] if anchor.claim in headline.accuracy else headline.accuracy
    for what, ids in [(ACCURACY, accuracy), *((cost, [id] if id else []) for cost, id in headline.costs.items())]:
        if row := _row(paper, ids, anchor, run, runs):
            rows[what] = row
    # What closes the anchor's gate as well is said of the whole.
    unsettled = {what: row.reason for what, row in rows.items()
                 if row.verdict == "not tested" and row.reason != anchor.reason}
    costs = {cost: _shares(paper.claim(id), rows[cost]) for cost, id in headline.costs.items()
             if cost in rows and cost not in unsettled}
    if ACCURACY in unsettled:
        # Nor is anything that stands beside it in the same comparison.
        return Finding(paper, anchor, costs=costs, unsettled=unsettled)
    points = _interval(rows[ACCURACY].values) if ACCURACY in rows else None
    arm = _arm(run.arms, headline, anchor)
    against = arm.measured if arm else {}
    beside: dict[Cost, Interval] = {}
    for cost, id in headline.costs.items():
        mean, half = against.get(cost, (None, None))
        if not id and mean is not None:
            beside[cost] = mean, math.nan if half is None else half
    return Finding(paper, anchor, points, costs, unsettled, beside, *_companions(run.pays, headline, anchor))


def _elsewhere(
    paper: Paper, anchor: ClaimResult, runs: Sequence[Outcome]
) -> Iterator[tuple[ClaimResult, Outcome]]:
    """The nearest row at each other place that was tested, with its run; the nearest place first."""
    same = paper.headline.accuracy if paper.headline and anchor.claim in paper.headline.accuracy else [anchor.claim]
    found, told = [each for claim in same for each in _rows(claim, runs, tested=True)], {_place(anchor)}
    for row, run in sorted(found, key=lambda pair: _nearness(paper, pair[0]), reverse=True):
        if _place(row) not in told:
            told.add(_place(row))
            yield row, run


def _nearest(
    paper: Paper, names: Sequence[str], runs: Sequence[Outcome]
) -> tuple[ClaimResult | None, Outcome | None]:
    """The row of the first of these claims that was tested, or else measured, nearest to the paper, with its run."""
    for tested in (True, False):
        for name in names:
            if found := _rows(name, runs, tested):
                return max(found, key=lambda pair: _nearness(paper, pair[0]))
    return None, None


def _rows(claim: str, runs: Sequence[Outcome], tested: bool) -> list[tuple[ClaimResult, Outcome]]:
    """The measured rows of a claim, each with its run; of `tested` alone those whose gates are open."""
    return [(row, run) for run in runs for row in run.rows
            if row.claim == claim and _measured(row) and not (tested and row.verdict == "not tested")]


def _measured(row: ClaimResult) -> bool:
    return row.measured is not None and row.verdict not in _NOWHERE and not row.by_model


def _nearness(paper: Paper, row: ClaimResult) -> tuple[bool, int, int, float]:
    wanted = paper.claim(row.claim).conditions
    met = sum(row.conditions.get(name) == value for name, value in wanted.items())
    images = row.conditions.get("train_images", 0)
    return row.verdict != "not tested", met, len(row.values), images if isinstance(images, (int, float)) else 0


def _row(
    paper: Paper, claims: Sequence[str], anchor: ClaimResult, run: Outcome, runs: Sequence[Outcome]
) -> ClaimResult | None:
    """The row of one of these claims: beside the anchor, where there is one, else the nearest to the paper."""
    for row in run.rows:
        if row.claim in claims and _measured(row) and _place(row) == _place(anchor):
            return row
    return _nearest(paper, claims, runs)[0]


def _place(row: ClaimResult) -> tuple[object, object]:
    return row.conditions.get("dataset"), row.conditions.get("network")


def _interval(values: Sequence[float | None]) -> Interval:
    return mean_interval([math.nan if value is None else value for value in values])


def _shares(claim: Claim, row: ClaimResult) -> Interval:
    return _interval([None if value is None or (claim.unit == "×" and value == 0) else ratio(claim, value)
                      for value in row.values])


def _arm(arms: Sequence[Against], headline: Headline, anchor: ClaimResult) -> Against | None:
    """The arm of the headline in the comparison that is of the anchor's data."""
    found = [each for each in arms if not headline.arm or each.arm == headline.arm]
    return max(found, key=lambda each: _named(each.comparison, anchor), default=None)


def _named(title: str, row: ClaimResult) -> int:
    """How many of a row's dataset and network stand in a title."""
    return sum(str(value) in title for value in _place(row) if value)


def _companions(
    pays: Sequence[Mapping[str, str]], headline: Headline, anchor: ClaimResult
) -> tuple[Companion | None, Companion | None]:
    """Plain training of the same cost and the placebo, from a table that `explore.payoff` made."""
    found = [row for row in pays if not headline.arm or row.get("arm") == headline.arm]
    if not found:
        return None, None
    row = max(found, key=lambda row: _named(row.get("run", ""), anchor))
    length = _parsed(row.get("equal cost, steps", ""))
    one = row.get("seeds", "1") == "1"
    equal, placebo = (_parsed(row.get(f"above {what} [points]", ""), one) for what in ("it", "the placebo"))
    return (Companion(equal, length[0] / 100 if length else None) if equal else None,
            Companion(placebo) if placebo else None)


def _parsed(text: str, one: bool = True) -> Interval | None:
    """The interval that `layerlab.show.interval.spread` wrote; None for anything else.

    Args:
        text: `+0.80 ± 0.30`; without a half-width where there is `one` seed, or where all seeds are equal.
    """
    found = _NUMBER.match(text.replace("−", "-"))
    if found is None:
        return None
    half = found[2]
    return float(found[1].replace(",", "")), float(half.replace(",", "")) if half else math.nan if one else 0.0
