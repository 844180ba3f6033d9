"""A line for each claim: what all runs measured of it, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from layerlab.contract.claims import OLDER, ClaimResult, Verdict
from layerlab.show.interval import with_minus

State = Literal["settled", "open", "by a model"]
STATES: dict[State, str] = {"settled": "Settled", "open": "Open", "by a model": "By a model, apart"}
_SETTLED: tuple[Verdict, ...] = ("reproduced", "holds", "weaker", "differs", "opposite")


class ClaimLine(NamedTuple):
    """What is known of a claim, in texts.

    Attributes:
        paper: the strategy's name.
        state: settled where a run settles it, by a model where a model alone speaks, else open.
        claim, where, published: as the paper has it.
        measured: by every run; what counts for no verdict stands in brackets.
        share: measured ÷ published, in the same order.
        verdict: of the runs that count.
        why: the reasons for it.
    """

    paper: str
    state: State
    claim: str
    where: str
    published: str
    measured: str
    share: str
    verdict: str
    why: str


def claim_lines(results: Sequence[ClaimResult]) -> list[ClaimLine]:
    """The claims of any number of papers, a line each, in the order in which they come.

    Args:
        results: rows of runs, those of `layerlab.contract.rows.completed`.
    """
    rows: dict[tuple[str, str], list[ClaimResult]] = {}
    for row in results:
        rows.setdefault((row.paper, row.claim), []).append(row)
    return [_line(each) for each in rows.values()]


def _line(rows: Sequence[ClaimResult]) -> ClaimLine:
    first = rows[0]
    counting = [row for row in rows if not row.apart and row.verdict != "not run"]
    names = _names(rows)
    measured = []
    for row, name in zip(rows, names, strict=True):
        if row.verdict != "not run":
            seeds = f", {len(row.seeds)} seed{'s' * (len(row.seeds) != 1)}" if row.seeds else ""
            text = f"{name}{seeds}: {row.measured_text}"
            measured.append(f"[{text}]" if row.apart else text)
    shares = [row.share_text for row in counting if row.share_text]
    verdicts: dict[str, list[str]] = {}
    for row, name in zip(rows, names, strict=True):
        if row in counting:
            verdicts.setdefault(row.verdict, []).append(name)
    said = [verdict if len(verdicts) == 1 else f"{verdict} ({', '.join(dict.fromkeys(those))})"
            for verdict, those in verdicts.items()]
    why = dict.fromkeys(row.reason for row in counting if row.reason)
    return ClaimLine(
        first.paper, _state(counting), f"{first.statement}{' (our own target)' if first.ours else ''}", first.where,
        with_minus(f"{first.paper_value:g} {first.unit}"), with_minus("; ".join(measured)) or "—",
        with_minus("; ".join(shares)), ", ".join(said) or "not run", with_minus("; ".join(why)))


def _state(rows: Sequence[ClaimResult]) -> State:
    if any(row.verdict in _SETTLED for row in rows):
        return "settled"
    return "by a model" if rows and all(row.verdict == "by a model" for row in rows) else "open"


def _names(rows: Sequence[ClaimResult]) -> list[str]:
    """What tells the runs of a claim apart: profile, dataset, and what is not as the profile has it."""
    names = []
    for row in rows:
        same = [each for each in rows if each.profile == row.profile]
        told = [row.profile]
        for key in ("dataset", "network"):
            if len({str(each.conditions.get(key, "")) for each in same}) > 1:
                told.append(str(row.conditions.get(key, "")))
        apart = OLDER if row.older else "other parameters" if row.changed else ""
        names.append(", ".join(filter(None, [" ".join(filter(None, told)), apart])))
    return names
