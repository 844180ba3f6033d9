"""What a notebook's run found out: its ratios and its answer, kept beside it and shown at the end of a batch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from layerlab.base.files import write_json

if TYPE_CHECKING:
    from layerlab.training.results import Comparison

# A cost, or the accuracy → the metric of `Comparison.paired` that tells it.
MEASURED = {"points": "top-1", "time": "seconds", "compute": "TFLOP", "memory": "peak MB"}
# Variable of a notebook's kernel: the file to which its sessions append their answers.
ANSWERS = "LAYERLAB_ANSWERS"
# What a session's comparisons measured, in its folder and in MLflow.
ANSWERS_FILE = "answers.json"
# The page of a session, in its folder.
PAGE = "answer.html"


class Against(BaseModel):
    """An arm against the baseline of its comparison, seed by seed.

    Attributes:
        comparison: its title in the notebook.
        arm: with strategies.
        seeds: how many.
        measured: name of `MEASURED` → (mean, half-width of the 95 % interval): points of top-1, ratios of costs. None
            where it was not measured, and for the half-width of one seed.
        pays: `yes`, `no` or `undecided` against plain training of the same cost; empty where there was none.
    """

    comparison: str
    arm: str
    seeds: int
    measured: dict[str, tuple[float | None, float | None]]
    pays: str = ""


class Answer(BaseModel):
    """What one session found out.

    Attributes:
        sentence: in words; empty where nobody drew a conclusion.
        arms: in numbers.
        page: the file that shows both, as a path; empty where there is none.
        run: the session's in MLflow.
    """

    sentence: str = ""
    arms: list[Against] = []
    page: str = ""
    run: str = ""


def against_baseline(title: str, comparison: Comparison) -> list[Against]:
    """Every arm with strategies against the baseline of a comparison; nothing where there is none.

    Args:
        title: of the comparison.
    """
    given = comparison.given
    if not given.baseline or given.baseline not in given.arms:
        return []
    found = []
    for arm in given.arms:
        if arm == given.baseline or not any(result.strategies for result in given.of(arm)):
            continue
        measured = {}
        for name, metric in MEASURED.items():
            estimate = comparison.paired(metric, arm, given.baseline)
            measured[name] = (_number(estimate.mean), _number(estimate.half))
        pays = comparison.pays(arm).verdict if arm in comparison.equal else ""
        found.append(Against(comparison=title, arm=arm, seeds=len(given.seeds), measured=measured, pays=pays))
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def names(arms: Iterable[Against]) -> list[str]:
    """What to call each arm in a table of all: its name, with the comparison's where several were made."""
    arms = list(arms)
    several = len({each.comparison for each in arms}) > 1
    return [f"{each.comparison}: {each.arm}" if several else each.arm for each in arms]


def answer_metrics(answer: Answer) -> dict[str, float]:
    """The numbers of an answer as MLflow shows them: `ARM/time`, with `ARM/time low` and `ARM/time high`."""
    found: dict[str, float] = {}
    for name, each in zip(names(answer.arms), answer.arms, strict=True):
        for what, (mean, half) in each.measured.items():
            found |= interval_metrics(f"{name}/{what}", mean, half)
    return found


def interval_metrics(name: str, mean: float | None, half: float | None) -> dict[str, float]:
    """A mean as the metric of that name, the ends of its 95 % interval as `NAME low` and `NAME high`."""
    if mean is None or not math.isfinite(mean):
        return {}
    if half is None or not math.isfinite(half):
        return {name: mean}
    return {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}


def append_answer(file: Path, answer: Answer) -> None:
    """Put a session's answer into the file of its notebook, in the place of an earlier one of the same run."""
    others = [each for each in read_answers(file) if each.run != answer.run]
    write_json(file, [each.model_dump() for each in (*others, answer)])


def read_answers(file: Path) -> list[Answer]:
    """The answers in a file; none where there is no such file, or it holds anything else."""
    with contextlib.suppress(OSError, ValueError):
        return answers_of({"answers": json.loads(file.read_text(encoding="utf-8"))})
    return []


def answers_of(record: Mapping[str, Any]) -> list[Answer]:
    """The answers that a record keeps; none where it keeps anything else."""
    found = record.get("answers")
    try:
        return [Answer.model_validate(each) for each in found] if isinstance(found, list) else []
    except ValidationError:
        return []
