"""The line of a paper: what its method costs and gains, whether that pays, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from layerlab.base.provenance import processor_of
from layerlab.base.screen import printable
from layerlab.contract.claims import ClaimResult
from layerlab.contract.headline import Cost
from layerlab.contract.paper import Paper
from layerlab.contract.rows import sentence
from layerlab.reporting.findings import Finding, Interval, Outcome, finding, outcome
from layerlab.reporting.wording import EQUAL, PLACEBO, over, points_text
from layerlab.show.interval import with_minus
from layerlab.show.table import markdown_text

# Of a run at this profile no more is said than that the notebook runs.
QUICK = "quick"
NOUNS: dict[str, str] = {
    "time": "training time", "compute": "compute", "memory": "peak memory", "size": "storage",
    "inference": "time for inference",
}


def bottom_line(paper: Paper, runs: Iterable[Outcome]) -> str:
    """The sentence of a paper; another one for each further dataset and network that was tested.

    Args:
        paper: the paper; one without a headline gets the count of its verdicts.
        runs: what its runs left, those alone that count: the profiles' own parameters, today's code. Where one goes
            beyond the profile `quick`, `quick` is left out.
    """
    runs = list(runs)
    found = headline_finding(paper, runs)
    if found is None:
        return sentence(paper.strategy, [row for run in _telling(runs) for row in run.rows])
    return said(found)


def headline_finding(paper: Paper, runs: Iterable[Outcome]) -> Finding | None:
    """What the sentence of a paper says; None for a paper without a headline. The arguments are `bottom_line`'s."""
    return None if paper.headline is None else finding(paper, _telling(runs))


def _telling(runs: Iterable[Outcome]) -> list[Outcome]:
    """The runs beyond the profile `quick`; where there are none, `quick`."""
    runs = [run for run in runs if run.rows]
    return [run for run in runs if run.rows[0].profile != QUICK] or runs


def kept_outcomes(profiles: Mapping[Path, Sequence[ClaimResult]]) -> list[Outcome]:
    """What is kept of a paper and counts: what has other parameters or older code stays out.

    Args:
        profiles: folder → its rows.
    """
    return [outcome(folder, rows) for folder, rows in profiles.items() if counting(rows)]


def kept_line(paper: Paper, profiles: Mapping[Path, Sequence[ClaimResult]]) -> str:
    """The sentence of a paper from its `kept_outcomes`."""
    return bottom_line(paper, kept_outcomes(profiles))


def parted(paper: Paper, line: str) -> tuple[str, str]:
    """The method's name, with which a paper's line starts and which pages show in bold letters, and what follows it."""
    name = paper.headline.method if paper.headline else paper.strategy
    return name, line.removeprefix(name)


def markdown_line(paper: Paper, line: str) -> str:
    """A paper's line in Markdown."""
    name, rest = parted(paper, line)
    return f"**{markdown_text(name)}**{markdown_text(rest)}"


def counting(rows: Sequence[ClaimResult]) -> bool:
    """Whether a run's rows count for verdicts."""
    return bool(rows) and not any(row.apart for row in rows)


def said(found: Finding) -> str:
    """A finding in one sentence, and one for each of what was found elsewhere."""
    headline = found.paper.headline
    assert headline is not None
    if found.anchor is None:
        id = next(filter(None, [*headline.costs.values(), *headline.accuracy]))
        claim = found.paper.claim(id)
        return with_minus(f"{headline.method}: not measured with today's code; the paper claims {claim.value:g} "
                          f"{claim.unit} ({claim.statement}).")
    text = f"{headline.method} against {headline.against}: {_what(found)}; {_how_sure(found)}."
    for other in found.elsewhere:
        text += f" On {_where(other)}: {_what(other)}."
    return printable(with_minus(text))


def _what(found: Finding) -> str:
    """What was saved and lost, and how that is beside plain training of the same cost and the placebo."""
    parts = [_saved(cost, share) for cost, share in found.costs.items()]
    if found.points is not None:
        parts.append(_accuracy(found.points))
    text = _listed(parts)
    for what, reason in found.unsettled.items():
        text += f"; nothing is settled of {NOUNS.get(what, what)} ({reason})"
    if found.beside:
        text += f"; against training without it {_listed([_saved(*each) for each in found.beside.items()])}"
    if found.equal:
        text += f"; {over(found.equal.points, EQUAL)}"
    elif found.points is not None and {"time", "compute"} & {*found.costs, *found.beside}:
        # What else is saved, training less does not save.
        text += f"; not compared with {EQUAL}"
    if found.placebo:
        text += f"; {over(found.placebo.points, PLACEBO)}"
    return text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _saved(cost: Cost, share: Interval) -> str:
    """`32 ± 2 % less training time`."""
    mean, half = 100 * (1 - share[0]), 100 * share[1]
    if half > 0 and abs(mean) <= half:
        return f"no measurable saving of {NOUNS[cost]} ({_per_cent(mean, half)})"
    return f"{_per_cent(abs(mean), half)} {'less' if mean >= 0 else 'more'} {NOUNS[cost]}"


def _per_cent(mean: float, half: float) -> str:
    """To one decimal, or to none where that is within the interval."""
    decimals = 0 if half >= 1 else 1
    return f"{mean:.{decimals}f} ± {half:.{decimals}f} %" if half >= 0.05 else f"{mean:.{decimals}f} %"


def _accuracy(points: Interval) -> str:
    mean, half = points
    if mean == 0 and not half > 0:
        return "the same accuracy"
    if abs(mean) <= half:
        return f"no measurable difference in accuracy ({points_text(points)})"
    return f"{points_text((abs(mean), half), sign=False)} {'more' if mean >= 0 else 'less'} accuracy"


def _how_sure(found: Finding) -> str:
    """Under which conditions that is so, and what was not tested."""
    row, where = found.anchor, _where(found)
    assert row is not None
    if row.profile == QUICK:
        return f"the quick profile on {where}, which settles nothing"
    if row.verdict == "not tested":
        return f"this settles nothing ({where}): {row.reason}"
    if row.verdict in ("reproduced", "differs"):
        return f"{row.verdict} under the paper's conditions ({where})"
    if row.verdict == "undecided":
        return f"undecided ({where}): {row.reason}"
    return f"not tested at the paper's scale (here {where})"


def _where(found: Finding) -> str:
    """`mnist with lenet, 3 seeds, AMD EPYC`."""
    row = found.anchor
    assert row is not None
    parts = [" with ".join(str(row.conditions[key]) for key in ("dataset", "network") if key in row.conditions)]
    count = len(row.seeds) or len(row.values)
    # A single number without a seed is no sample.
    if row.seeds or count > 1:
        parts.append(f"{count} {'seed' if row.seeds else 'round'}{'s' if count > 1 else ''}")
    parts.append(processor_of(row.machine))
    return ", ".join(filter(None, parts))
