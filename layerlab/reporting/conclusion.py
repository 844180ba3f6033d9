"""A session's conclusion: the answer's page and its sentence, kept where runs are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlab.base.provenance import provenance, versions_text
from layerlab.reporting.answer_page import Report, answer_page
from layerlab.runs.answer import PAGE
from layerlab.runs.session import Session


def keep_report(session: Session, report: Report) -> Path:
    """Keep a report in a session's folder and in MLflow, as the page `answer.html` with what stands on it.

    Args:
        session: not closed yet.
        report: what was found; the machine, the versions and the session's identity are added here.

    Returns:
        The page's file.
    """
    where = provenance()
    facts = {"machine": where["machine"], "versions": versions_text(where["versions"]), "commit": where["commit"],
             "result": session.identity().id, "MLflow": f"experiment {session.experiment}, run {session.run_id}",
             "folder": str(session.folder)}
    facts = {name: text for name, text in {**report.facts, **facts}.items() if text}
    report = replace(report, facts=facts)
    words = {arm: judged.word for arm, judged in report.verdict.arms.items()}
    session.conclude(report.sentence, answer_page(report), words)
    return session.folder / PAGE
