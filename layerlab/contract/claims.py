"""A paper's claims, and what a run measured of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["reproduced", "holds at reduced scale", "differs", "not run"]
UNDECIDED = "undecided"


class Data(BaseModel):
    """What a paper.toml holds: read once, never changed, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(Data):
    """A number that the paper claims.

    Attributes:
        id: short name, `[a-z0-9-]+`.
        statement: one line, in words.
        value: the published number.
        unit: `%`, `points`, `×`, ….
        where: table, figure or section.
        neutral: the value that means no effect (0 for a saving, 1 for a speed-up): a measurement at reduced scale
            holds when it lies on the paper's side of it, its whole interval included.
        tolerance: how far a measurement under the paper's conditions may be off, in the claim's unit.
        analytic: follows from shapes alone, so that every run meets its conditions.
        conditions: what the number was obtained under; compared with a run's conditions by name.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    statement: str
    value: float
    unit: str
    where: str
    neutral: float | None = None
    tolerance: float = Field(gt=0)
    analytic: bool = False
    conditions: dict[str, Any] = {}


class ClaimResult(BaseModel):
    """One row of the scoreboard: a claim and what one notebook run measured of it.

    Attributes:
        paper: the strategy's name.
        claim, statement, where, unit, paper_value: from the claim.
        measured: mean over seeds; None when not run or never reached.
        interval: half-width of the 95 % interval; None for one seed.
        values: one a seed; None where it did not happen.
        seeds, profile, conditions: of the run.
        machine, versions, commit: where the number comes from.
        verdict, reason: see `judge`.
        mlflow_run: id of the notebook's run.
    """

    paper: str
    claim: str
    statement: str
    where: str
    unit: str
    paper_value: float
    measured: float | None = None
    interval: float | None = None
    values: list[float | None] = []
    seeds: list[int] = []
    profile: str
    conditions: dict[str, Any] = {}
    machine: str = ""
    versions: dict[str, str] = {}
    commit: str = ""
    verdict: Verdict = "not run"
    reason: str = ""
    mlflow_run: str = ""

    @property
    def undecided(self) -> bool:
        """Whether the interval leaves the verdict open, so that more seeds could turn it."""
        return self.reason.startswith(UNDECIDED)

    @property
    def measured_text(self) -> str:
        """`mean ± half-width unit`, or why there is none."""
        if self.measured is None:
            return "—" if self.verdict == "not run" else "never"
        # What seeds do not change differs by rounding alone.
        half = self.interval if (self.interval or 0) > 1e-9 * abs(self.measured) else 0.0
        spread = f" ± {half:.2g}" if self.interval is not None else ""
        return f"{self.measured:.4g}{spread} {self.unit}"

    @property
    def setting_text(self) -> str:
        """Where it was measured: dataset, network, seeds or rounds."""
        if self.verdict == "not run":
            return self.profile
        named = [str(self.conditions[key]) for key in ("dataset", "network") if key in self.conditions]
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}" if self.seeds else "no seeds"
        if not self.seeds and len(self.values) > 1:
            seeds = f"{len(self.values)} rounds"
        return ", ".join([self.profile, *named, seeds])
