"""The answer of a comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from layerlab.base.screen import printable
from layerlab.reporting.against import against_table
from layerlab.reporting.answers import TONES
from layerlab.reporting.paying import Verdict, headline
from layerlab.reporting.wording import EQUAL, PLACEBO
from layerlab.show import figures
from layerlab.show.table import Cell, Table
from layerlab.training.results import BASELINE, Comparison

# Kind of a point of the figure → which arm's companion it is.
STRATEGY = "strategy"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1c2733;background:#f5f7f9}"
    "main{max-width:66rem;margin:0 auto;padding:1.5rem 1.25rem 3rem;background:#fff}"
    "h1{font-size:1.45rem;line-height:1.35;margin:.25rem 0 1.25rem;overflow-wrap:break-word}"
    "h2{font-size:1.1rem;margin:2rem 0 .5rem}"
    ".of{color:#5a6a7a;margin:0}figure{margin:0}figure img{width:100%;max-width:46rem}"
    "figcaption,.small{color:#5a6a7a;font-size:.9rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}"
    "th,td{border-bottom:1px solid #dde3e9;padding:.35rem .7rem .35rem 0}th{color:#5a6a7a;font-weight:600}"
    "td+td,th+th{padding-left:.4rem}td[style*=right]{white-space:nowrap}"
    "@media(max-width:40rem){h1{font-size:1.15rem}main{padding:1rem}}"
    "pre{background:#f0f3f6;padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.88rem}"
)


@dataclass(frozen=True)
class Report:
    """What an answer's page shows.

    Attributes:
        title: what was trained on what: `resnet18 on my-images`.
        verdict: which arms pay.
        comparison: the numbers; None where nothing was compared.
        details: sentences below the table.
        left_out: arm → why it was not compared to the end.
        steps: what was chosen and by what, before the comparison: name → outcome.
        repeat: the command that does the same again.
        facts: where it was done, and with what: name → text.
    """

    title: str
    verdict: Verdict
    comparison: Comparison | None = None
    details: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    repeat: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The answer."""
        return headline(self.verdict, self.title)


def answer_page(report: Report) -> str:
    """The page: the sentence, the figure, the table, what was left out, how it was found out and how to repeat it."""
    parts = [f'<p class="of">{_html(report.title)}</p><h1>{_html(report.sentence)}</h1>']
    comparison = report.comparison
    if comparison is not None and len(comparison.given.arms) > 1:
        picture = figures.picture(figures.png(figures.payoff(payoff_points(comparison)), 160))
        picture = picture.replace("<img ", f'<img alt="{html.escape(report.sentence)}" ', 1)
        parts += [
            f"<figure>{picture}<figcaption>Up: more accurate than the baseline. Left: quicker. A strategy pays where "
            "it is above plain training of the same cost, to which a line leads. Bars are 95 % intervals over "
            f"{len(comparison.seeds)} seeds.</figcaption></figure>",
            f'<h2>In numbers</h2><div class="wide">{numbers_table(report).html()}</div>',
        ]
    parts += [f"<p>{_html(text)}</p>" for text in report.details]
    parts.append("<h2>What was left out</h2>")
    parts.append(_table(report.left_out) if report.left_out else "<p>Nothing was left out.</p>")
    if report.steps:
        parts.append(f"<h2>How it was found out</h2>{_table(report.steps)}")
    if report.repeat:
        parts.append(f"<h2>How to repeat it</h2><pre>{html.escape(printable(report.repeat))}</pre>")
    if report.facts:
        parts.append(_table(report.facts))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{_html(report.title)}: does it pay?</title>'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def numbers_table(report: Report) -> Table:
    """Every arm against the baseline, with the word on whether it pays."""
    assert report.comparison is not None
    table = against_table(report.comparison.given if not report.verdict.arms else report.comparison)
    # The word of the verdict stands in the place of the plain comparison's.
    keep = [number for number, name in enumerate(table.header) if name != "pays"]
    rows: list[list[str | Cell]] = []
    for row in table.rows:
        name = row[0] if isinstance(row[0], str) else row[0].text
        if len(row) < len(table.header):
            continue
        judged = report.verdict.arms.get(name)
        word = Cell(judged.word, TONES[judged.word]) if judged else "—"
        rows.append([*(row[number] for number in keep), word])
    return Table([*(table.header[number] for number in keep), "pays"], rows, table.caption)


def payoff_points(comparison: Comparison) -> pd.DataFrame:
    """A row a point of `figures.payoff`: time as a ratio, accuracy as a difference, both to the baseline."""
    baseline = comparison.baseline or BASELINE
    rows: list[dict[str, Any]] = []
    for arm in comparison.given.arms:
        if arm == baseline:
            continue
        points = {STRATEGY: arm, EQUAL: comparison.equal.get(arm), PLACEBO: comparison.placebos.get(arm)}
        time = comparison.paired("seconds", arm, baseline).interval
        for kind, name in points.items():
            if name is None:
                continue
            # Those beside the arm did not take turns with the baseline: plain training takes as long as its steps say,
            # and a placebo what its arm takes.
            x, xs = (comparison.pays(arm).length, math.nan) if kind == EQUAL else time
            y, ys = comparison.paired("top-1", name, baseline).interval
            rows.append({"arm": arm, "kind": kind, "x": x, "x ±": xs, "y": y, "y ±": ys})
    return pd.DataFrame(rows, columns=["arm", "kind", "x", "x ±", "y", "y ±"]).replace({math.inf: math.nan})


def _table(rows: Mapping[str, str]) -> str:
    return f'<div class="wide">{Table(("", ""), [[Cell(name), text] for name, text in rows.items()]).html()}</div>'


def _html(text: str) -> str:
    return html.escape(printable(text))
