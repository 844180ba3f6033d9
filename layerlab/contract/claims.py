"""A paper's claims, and what a run measured of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from layerlab.base.names import FileName, FileNameOrNone
from layerlab.show.interval import spread

Verdict = Literal[
    "reproduced", "holds", "weaker", "undecided", "differs", "opposite", "not tested", "by a model", "not run",
]
Kind = Literal["effect", "at-most", "value", "trend"]
# Said of a row whose plugin's code has changed since.
OLDER = "made by older code"
# Seeds below which nothing is decided under the paper's conditions.
FEWEST = 3


# What stands in each place of a new plugin that its author fills in.
PLACEHOLDER = "Replace:"


def placeholders(value: Any, place: str = "") -> list[str]:
    """The places at which data still hold a placeholder, such as `claims.gain.quote`.

    Args:
        value: mappings, lists, texts and numbers; of a mapping in a list, its `id` names it.
        place: of the value itself.
    """
    if isinstance(value, str):
        return [place] if PLACEHOLDER in value else []
    if isinstance(value, Mapping):
        return [found for key, each in value.items() for found in placeholders(each, f"{place}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        found = []
        for index, each in enumerate(value):
            name = each.get("id", index) if isinstance(each, Mapping) else index
            found += placeholders(each, f"{place}.{name}")
        return found
    return []


class Data(BaseModel):
    """What a paper.toml holds: read once, never changed, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Gate(Data):
    """A condition on a run's own numbers without which it cannot speak of a claim.

    Attributes:
        observed: the number's name, as the run hands it over: `baseline top-1`.
        at_least, at_most: its bound, in its unit; or dataset → bound, where each dataset has its own.
        shows: what a number within the bound shows, such as `the baseline trains`.
    """

    observed: str
    at_least: float | dict[str, float] | None = None
    at_most: float | dict[str, float] | None = None
    shows: str

    @model_validator(mode="after")
    def _has_a_bound(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


class Claim(Data):
    """A number that the paper claims.

    Attributes:
        id: short name, `[a-z0-9-]+`.
        statement: one line, in words.
        value: the published number.
        unit: `%`, `points`, `×`, ….
        where: table, figure or section.
        quote: a few of the paper's own words, which a test finds in its text.
        kind: `effect`, a difference from `neutral`; `trend`, the same of a change along a variable; `at-most`, a loss
            that is said to be small, where lower values are worse; `value`, a number without a direction.
        neutral: the value that means no effect: 0 for a saving, 1 for a speed-up. An effect or a trend has one.
        tolerance: how far a measurement under the paper's conditions may be off, in the claim's unit; smaller than the
            effect.
        null: the arm that a user would run today without the method, against which the number was measured.
        gates: what the run must show before it can speak.
        analytic: follows from shapes alone, so that every run meets its conditions and no seed changes it.
        by_model: is computed by a model in every run, never measured.
        conditions: what the number was obtained under; compared with a run's conditions by name.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    statement: str
    value: float
    unit: str
    where: str
    quote: str = ""
    kind: Kind = "value"
    neutral: float | None = None
    tolerance: float = Field(gt=0)
    null: str = ""
    gates: list[Gate] = Field(default_factory=list)
    analytic: bool = False
    by_model: bool = False
    conditions: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_judged(self) -> Claim:
        if self.kind in ("effect", "trend"):
            if self.neutral is None:
                raise ValueError(f"claim {self.id!r} is of kind {self.kind!r} and needs neutral")
            if self.tolerance >= abs(self.value - self.neutral):
                raise ValueError(f"claim {self.id!r}: the tolerance {self.tolerance:g} is not smaller than the effect "
                                 f"{abs(self.value - self.neutral):g}, so that no effect at all would reproduce it")
        elif self.neutral is not None:
            raise ValueError(f"claim {self.id!r} is of kind {self.kind!r}, which has no neutral")
        if self.analytic and (self.unit == "points" or "top-" in self.statement or "accuracy" in self.statement):
            raise ValueError(f"claim {self.id!r} is an accuracy, which does not follow from shapes; leave analytic out")
        if not (self.analytic or self.by_model or self.conditions):
            raise ValueError(f"claim {self.id!r} has no conditions; give those that the paper states")
        return self


class ClaimResult(BaseModel):
    """One row of the scoreboard: a claim and what one notebook run measured of it.

    Attributes:
        paper: the strategy's name, as a folder has it.
        claim, statement, where, unit, paper_value: from the claim.
        measured: mean over seeds; None when not run or never reached.
        interval: half-width of the 95 % interval; None for one seed.
        values: one for each seed; None where it did not happen.
        seeds, profile, conditions: of the run; no profile in a row that stands for no run.
        changed: parameters that were not as the profile has them, with their values; None for one that the run did not
            know. A profile's result has none.
        result: id of what it comes from, see `layerlab.contract.identity`; empty before a run has ended.
        observed: the run's own numbers, which gates read.
        published_share: measured ÷ published effect; None where there is none.
        by_model: whether a model computed the values.
        ours: a target of this project's, not a claim of the paper.
        older: the plugin's code has changed since; it counts for no verdict.
        machine, versions, commit: where the number comes from.
        verdict, reason: see `judge`.
        mlflow_run: id of the notebook's run.
    """

    paper: FileName
    claim: str
    statement: str
    where: str
    unit: str
    paper_value: float
    measured: float | None = None
    interval: float | None = None
    values: list[float | None] = []
    seeds: list[int] = []
    profile: FileNameOrNone
    changed: dict[str, Any] = {}
    result: str = ""
    conditions: dict[str, Any] = {}
    observed: dict[str, float | None] = {}
    published_share: float | None = None
    by_model: bool = False
    ours: bool = False
    older: bool = False
    machine: str = ""
    versions: dict[str, str] = {}
    commit: str = ""
    verdict: Verdict = "not run"
    reason: str = ""
    mlflow_run: str = ""

    @field_validator("verdict", mode="before")
    @classmethod
    def _of_an_older_version(cls, value: Any) -> Any:
        # Rows are judged anew when they are read; what an older version said only has to be readable.
        return "holds" if value == "holds at reduced scale" else value

    @property
    def measured_text(self) -> str:
        """`mean ± half-width unit`, or why there is none."""
        if self.measured is None:
            return "—" if self.verdict == "not run" else "never"
        half = math.nan if self.interval is None else self.interval
        if half > 1e-9 * abs(self.measured):
            return f"{spread(self.measured, half)} {self.unit}"
        # What seeds do not change differs by rounding alone.
        return f"{self.measured:.4g} {self.unit}"

    @property
    def share_text(self) -> str:
        """Measured ÷ published, or nothing."""
        if self.published_share is None or not math.isfinite(self.published_share):
            return ""
        return f"{self.published_share:.2g}"

    @property
    def changed_texts(self) -> list[str]:
        """What was not as the profile has it: `alpha = 3`, `without equal`."""
        return [f"without {name}" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"
                for name, value in self.changed.items()]

    @property
    def apart(self) -> bool:
        """Whether it counts for no verdict: other parameters than its profile's, or code that has changed since."""
        return bool(self.changed) or self.older

    @property
    def setting_text(self) -> str:
        """Where it was measured: profile and what was not as it has it, dataset, network, seeds or rounds, id."""
        if self.verdict == "not run":
            return self.profile
        named = [str(self.conditions[key]) for key in ("dataset", "network") if key in self.conditions]
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}" if self.seeds else "no seeds"
        if not self.seeds and len(self.values) > 1:
            seeds = f"{len(self.values)} rounds"
        older = [OLDER] if self.older else []
        text = ", ".join([self.profile, *older, *self.changed_texts, *named, seeds])
        return f"{text} · {self.result}" if self.result else text
