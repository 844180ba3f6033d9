"""The answers of a batch's notebooks side by side: which parameters, what was gained and what it cost."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from layerlab.base.text import as_json, assigned
from layerlab.runs.answer import MEASURED, Against, Answer, answers_of, names
from layerlab.runs.jobs import Job
from layerlab.runs.record import read_record
from layerlab.show.interval import signed, spread
from layerlab.show.table import Cell, Table, Tone

# Of a notebook with more arms than this, one line with the answer is enough to read.
MOST_ARMS = 3
HEADINGS = {"points": "top-1 [points]", "time": "time [×]", "compute": "compute [×]"}
NOT_FINISHED = "not finished"
TONES: dict[str, Tone] = {"yes": "good", "no": "warning", "undecided": "faint"}


def answers_table(jobs: Sequence[Job]) -> Table:
    """The answers, to be read: a row for each arm against the baseline; the sentence alone where there are many arms.

    Args:
        jobs: of a batch, told apart by what differs between them.
    """
    rows: list[list[str | Cell]] = []
    notes: list[str] = []
    for job in jobs:
        run = assigned(job.differs) or " ".join(filter(None, (job.name, job.profile)))
        answers = _answers(job)
        if answers is None:
            rows.append([run, NOT_FINISHED])
            continue
        for answer in answers:
            told = answer.arms if 0 < len(answer.arms) <= MOST_ARMS else []
            rows += [_row(run, name, each) for name, each in zip(names(told), told, strict=True)]
            if told and answer.sentence and len(jobs) <= MOST_ARMS:
                notes += [answer.sentence, *([os.path.relpath(answer.page)] if answer.page else [])]
            if not told and answer.sentence:
                rows.append([run, answer.sentence])
    pays = any(len(row) > 2 and row[-1] != "" for row in rows)
    if not pays:
        rows = [row[:-1] if len(row) > 2 else row for row in rows]
    header = ["run", "arm", *HEADINGS.values(), *(["pays"] if pays else [])]
    return Table(header, rows, notes=notes)


def _row(run: str, name: str, arm: Against) -> list[str | Cell]:
    values = {what: (_finite(mean), _finite(half)) for what, (mean, half) in arm.measured.items()}
    told = [signed(values[what]) if what == "points" else spread(*values[what]) for what in HEADINGS]
    return [run, name, *told, Cell(arm.pays, TONES.get(arm.pays, "")) if arm.pays else ""]


def _finite(value: float | None) -> float:
    return math.nan if value is None else value


def _answers(job: Job) -> list[Answer] | None:
    """What a job answered; None where it has not come to its end."""
    record = read_record(Path(job.folder))
    return answers_of(record) if record.get("finished") else None


def answers_data(jobs: Sequence[Job]) -> Table:
    """The same for programs: every arm of every notebook, one number a column, a column for each parameter that
    differs.

    A ratio or difference stands in its column, the half-width of its 95 % interval in the one with ` ±`; both are empty
    where they were not measured.
    """
    differing = list(dict.fromkeys(name for job in jobs for name in job.differs))
    numbers = [column for what in MEASURED for column in (what, f"{what} ±")]
    header = ["notebook", "profile", *differing, "status", "comparison", "arm", "seeds", *numbers, "pays", "answer",
              "page", "run", "folder"]
    rows = []
    for job in jobs:
        answers = _answers(job)
        start = [job.name, job.profile, *(str(as_json(job.differs.get(name, ""))) for name in differing),
                 NOT_FINISHED if answers is None else "finished"]
        for answer in answers or [Answer()]:
            end = [answer.sentence, answer.page, answer.run, job.folder]
            for each in answer.arms:
                values = [value for what in MEASURED for value in each.measured.get(what, (None, None))]
                rows.append([*start, each.comparison, each.arm, str(each.seeds),
                             *("" if value is None else f"{value:.6g}" for value in values), each.pays, *end])
            if not answer.arms:
                rows.append([*start, *[""] * (4 + len(numbers)), *end])
    return Table(header, rows)
