"""Rows of the scoreboard: merged, completed, counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

from layerlab.contract.claims import ClaimResult, Verdict
from layerlab.contract.paper import Paper

if TYPE_CHECKING:
    import pandas as pd

SCOREBOARD = ("claim", "where", "paper", "measured", "÷ paper", "run", "verdict")


def scoreboard(results: Sequence[ClaimResult]) -> pd.DataFrame:
    """The rows as a table of texts, with the columns of `SCOREBOARD`; claims of several papers begin with its name."""
    import pandas as pd

    return pd.DataFrame(scoreboard_texts(results), columns=list(SCOREBOARD))


def scoreboard_texts(results: Sequence[ClaimResult]) -> list[dict[str, str]]:
    """The rows of `scoreboard`: column → text."""
    several = len({result.paper for result in results}) > 1
    return [
        {
            "claim": f"{result.paper}: {result.statement}" if several else result.statement,
            "where": result.where,
            "paper": f"{result.paper_value:g} {result.unit}",
            "measured": result.measured_text,
            "÷ paper": result.share_text,
            "run": result.setting_text,
            "verdict": result.verdict + (f" ({result.reason})" if result.reason else ""),
        }
        for result in results
    ]


def merged(results: Iterable[ClaimResult]) -> list[ClaimResult]:
    """The results of several runs of a paper in one list, in the claims' order.

    A claim that one run measured is not listed as `not run` for another, and one that follows from shapes alone is
    listed once. What a run with other parameters than its profile's measured, or with code that has changed since,
    stands beside the profile's own result, never in its place.
    """
    results = list(results)
    rows = sorted(results, key=lambda row: row.apart)
    measured = {row.claim for row in rows if row.verdict != "not run" and not row.apart}
    kept: dict[tuple[object, ...], ClaimResult] = {}
    for row in rows:
        if row.verdict == "not run" and (row.claim in measured or row.apart):
            continue
        where: tuple[object, ...] = (row.older, json.dumps(row.changed, sort_keys=True, default=str))
        if row.seeds:
            where += (row.profile, row.conditions.get("dataset"), row.conditions.get("network"))
        kept.setdefault((row.claim, *where), row)
    claims = list(dict.fromkeys(row.claim for row in results))
    return sorted(kept.values(), key=lambda row: claims.index(row.claim))


def completed(paper: Paper, results: Iterable[ClaimResult]) -> list[ClaimResult]:
    """Every claim of a paper in its order: what runs measured of it, or a row that says `not run`.

    A result of a claim that the plugin has dropped since, which is no claim of the paper any more, is left out.

    Args:
        results: of runs of this paper, any number of each claim.
    """
    order = [claim.id for claim in paper.everything]
    known = [result for result in results if result.claim in order]
    found = {result.claim for result in known}
    absent = [paper.not_run(claim, "") for claim in paper.everything if claim.id not in found]
    return sorted(merged(known + absent), key=lambda row: order.index(row.claim))


def counts(rows: Sequence[ClaimResult]) -> dict[Verdict, str]:
    """How many of the paper's claims have each verdict; an empty text for none.

    This project's targets do not count. A run with other parameters than its profile's or with older code does not
    count either: what it alone measured of the claims is not run.
    """
    claims = [row for row in rows if not row.ours]
    own = [row for row in claims if not row.apart]
    found = Counter(row.verdict for row in own)
    found["not run"] += len({row.claim for row in claims} - {row.claim for row in own})
    return {verdict: f"{found[verdict] or ''}" for verdict in get_args(Verdict)}


def sentence(paper: str, rows: Sequence[ClaimResult]) -> str:
    """What rows say of a paper, what it cannot say and why, in one line."""
    claims = [row for row in rows if not row.ours]
    own = {row.claim for row in claims if not row.apart}
    # Of a claim that no run of the profile measured, what was measured otherwise is all that there is to say.
    claims = [row for row in claims if not row.apart or row.claim not in own]
    said = []
    for verdict in get_args(Verdict):
        count = sum(row.verdict == verdict for row in claims)
        if count and verdict != "not run":
            said.append(f"{count} {verdict}")
    why = Counter(row.reason for row in claims if row.verdict == "not tested").most_common(1)
    text = f"{paper}: {', '.join(said) or 'nothing was run'} of {len(claims)} claims"
    return text + (f"; not tested because {why[0][0]}" if why else "") + "."


def tally(results: Sequence[ClaimResult]) -> pd.DataFrame:
    """`counts` of each paper, a row a paper."""
    import pandas as pd

    papers = dict.fromkeys(row.paper for row in results)
    table = {paper: counts([row for row in results if row.paper == paper]) for paper in papers}
    return pd.DataFrame.from_dict(table, orient="index", columns=list(get_args(Verdict))).rename_axis("paper")
