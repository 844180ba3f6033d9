"""A session's conclusion: the answer's page, its sentence, tables and figure, kept where runs are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlab.base.provenance import provenance, versions_text
from layerlab.reporting.against import against
from layerlab.reporting.answer_page import Report, answer_page, payoff_points
from layerlab.runs.answer import PAGE
from layerlab.runs.session import Session
from layerlab.show import figures


def conclude(session: Session, report: Report) -> Path:
    """Keep a report in a session's folder and in MLflow, as the page `answer.html` with what stands on it.

    Args:
        session: not closed yet.
        report: what was found; the machine, the versions and the session's identity are added here.

    Returns:
        The page's file.
    """
    if report.comparison is not None and len(report.comparison.given.arms) > 1:
        session.table("runs", report.comparison.runs)
        session.table("against", against(report.comparison))
        session.figure("payoff", figures.payoff(payoff_points(report.comparison)))
    where = provenance()
    facts = {"machine": where["machine"], "versions": versions_text(where["versions"]), "commit": where["commit"],
             "result": session.identity().id, "MLflow": f"experiment {session.experiment}, run {session.run_id}",
             "folder": str(session.folder)}
    facts = {name: text for name, text in {**report.facts, **facts}.items() if text}
    report = replace(report, facts=facts)
    session.conclude(report.sentence, answer_page(report))
    return session.folder / PAGE
