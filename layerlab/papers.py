"""A paper's tables and claims as data, and what a measurement says of a claim."""

from __future__ import annotations

import importlib.util
import math
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from layerlab.errors import LayerlabError, LayerlabWarning, sentence, unknown
from layerlab.measure import mean_interval
from layerlab.registry import NAME, Plugin

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["reproduced", "holds at reduced scale", "differs", "not run"]
UNDECIDED = "undecided"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Table(_Data):
    """A table of the paper, cell by cell.

    Attributes:
        id: as the paper numbers it.
        title: the caption.
        columns: headings.
        rows: cells, numbers or texts.
    """

    id: str
    title: str
    columns: list[str]
    rows: list[list[float | int | str]]

    @property
    def frame(self) -> pd.DataFrame:
        """As a table, indexed by the first column."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=self.columns).set_index(self.columns[0])


class Claim(_Data):
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


class Profile(_Data):
    """A set of values for the notebook's parameters.

    Attributes:
        description: what it runs on and how long it takes.
        parameters: name → value.
        cores: threads that a run should have; `all` keeps the machine to itself, for runs that are long or that time
            what they do.
        memory_gb: host memory that a run may take, in 10⁹ bytes.
    """

    description: str
    parameters: dict[str, Any]
    cores: PositiveInt | Literal["all"] = 1
    memory_gb: PositiveFloat = 2.0


class Paper(_Data):
    """What a plugin's `paper.toml` says.

    Attributes:
        title, authors, year, venue, link: bibliographic.
        summary: the paper in three sentences.
        formula: its central equation, in LaTeX.
        notebook: file name, beside `paper.toml`.
        tables, claims, profiles: see their classes.
    """

    title: str
    authors: str
    year: int
    venue: str
    link: str = ""
    summary: str
    formula: str
    notebook: str
    tables: list[Table] = []
    claims: list[Claim]
    profiles: dict[str, Profile]
    strategy: str = ""
    folder: Path = Path()

    @property
    def short_authors(self) -> str:
        """`One`, `One and Two` or `One et al.`, by family names; `?` where the paper names nobody."""
        families = [name.split()[-1] for name in self.authors.split(",") if name.strip()] or ["?"]
        return " and ".join(families) if len(families) < 3 else f"{families[0]} et al."

    @property
    def citation(self) -> str:
        """`Title (authors, year)`."""
        return f"{self.title} ({self.short_authors}, {self.year})"

    @property
    def notebook_file(self) -> Path:
        """The notebook that reproduces the paper.

        Raises:
            LayerlabError: it is not there.
        """
        file = (self.folder / self.notebook).resolve()
        if not file.is_file():
            raise LayerlabError(f"The notebook {self.folder / self.notebook} of {self.strategy!r} is missing; "
                                "install its plugin anew.")
        return file

    def __str__(self) -> str:
        from layerlab import tables

        return tables.paper_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab import tables

        return tables.paper_table(self)._repr_html_()

    def judged(self, result: ClaimResult) -> ClaimResult:
        """A row with the verdict that `judge` gives it today, whatever version wrote it; a claim that the paper no
        longer has keeps its own."""
        claim = next((claim for claim in self.claims if claim.id == result.claim), None)
        if claim is None:
            return result
        values = [math.nan if value is None else value for value in result.values]
        verdict, reason = judge(claim, values, result.conditions, bool(result.seeds))
        return result.model_copy(update={"verdict": verdict, "reason": reason})

    def table(self, id: str) -> Table:
        """The table that the paper numbers so.

        Raises:
            LayerlabError: there is none.
        """
        found = {table.id: table for table in self.tables}
        if id not in found:
            raise unknown("table", id, found)
        return found[id]

    def claim(self, id: str) -> Claim:
        """The claim of that id.

        Raises:
            LayerlabError: there is none.
        """
        found = {claim.id: claim for claim in self.claims}
        if id not in found:
            raise unknown("claim", id, found)
        return found[id]

    def not_run(self, claim: Claim, profile: str) -> ClaimResult:
        """The row of a claim that nothing was measured of."""
        return ClaimResult(
            paper=self.strategy, claim=claim.id, statement=claim.statement, where=claim.where, unit=claim.unit,
            paper_value=claim.value, profile=profile,
        )

    def profile(self, name: str) -> Profile:
        """The run profile of that name.

        Raises:
            LayerlabError: there is none.
        """
        if name not in self.profiles:
            raise unknown("profile", name, self.profiles)
        return self.profiles[name]


def read_paper(file: Path, strategy: str) -> Paper:
    """Read a `paper.toml`.

    Raises:
        LayerlabError: missing, no TOML, or not of `Paper`'s form.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        return Paper(**content, strategy=strategy, folder=file.parent)
    except FileNotFoundError:
        raise LayerlabError(f"Strategy {strategy!r} has no {file}; a plugin keeps its paper.toml there.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, OSError) as error:
        raise LayerlabError(f"{file} cannot be read: {error}.") from None
    except ValidationError as error:
        raise LayerlabError(sentence(error, str(file))) from None


def load_paper(strategy: str | Plugin) -> Paper:
    """The paper of an installed strategy: `paper.toml` in the package that its entry point names.

    The package is not imported: whoever only starts its notebook does without torch.

    Raises:
        LayerlabError: no such strategy, or no readable paper.
    """
    if isinstance(strategy, str):
        from layerlab import strategies

        strategy = strategies[strategy]
    if not NAME.fullmatch(strategy.name):
        raise LayerlabError(f"Plugin {strategy.name!r} of distribution {strategy.distribution!r} has a name that no "
                            f"strategy may have; uninstall {strategy.distribution}.")
    package = strategy.target.partition(":")[0].partition(".")[0]
    try:
        found = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):  # what is half there
        found = None
    if found is None or not found.submodule_search_locations:
        raise LayerlabError(f"Strategy {strategy.name!r} points to {strategy.target}, and there is no package "
                            f"{package!r}; install {strategy.distribution} anew.")
    return read_paper(Path(found.submodule_search_locations[0]) / "paper.toml", strategy.name)


def readable_papers() -> list[Paper]:
    """The papers of all installed strategies; for one that cannot be read there is a warning instead."""
    from layerlab import strategies

    papers = []
    for name in strategies:
        try:
            papers.append(load_paper(name))
        except LayerlabError as error:
            warnings.warn(f"{name} is left out: {error}", LayerlabWarning, stacklevel=3)
    return papers


def judge(
    claim: Claim, values: Sequence[float], conditions: Mapping[str, Any], seeded: bool = True
) -> tuple[Verdict, str]:
    """What measured values say of a claim.

    Args:
        values: one a seed, in the claim's unit; a value that is not finite means that what the claim speaks of did not
            happen with that seed (a target accuracy never reached, say).
        conditions: what they were measured under.
        seeded: whether seeds could change them.

    Returns:
        (verdict, why in a few words).
    """
    if not values:
        return "not run", ""
    if not all(math.isfinite(value) for value in values):
        missing = sum(not math.isfinite(value) for value in values)
        return "differs", f"did not happen in {missing} of {len(values)} runs"
    mean, half = mean_interval(values)
    spread = 0.0 if math.isnan(half) else half
    same = claim.analytic or (
        bool(claim.conditions) and all(conditions.get(name) == wanted for name, wanted in claim.conditions.items())
    )
    if same:
        off, allowed = mean - claim.value, f"{claim.tolerance:g} {claim.unit}"
        if abs(off) <= claim.tolerance >= spread:
            return "reproduced", f"within {allowed}"
        if abs(off) - spread <= claim.tolerance:
            return "differs", f"{UNDECIDED}: the interval has values within {allowed} and others"
        return "differs", f"off by {off:+.3g} {claim.unit}"
    if claim.neutral is None:
        return "differs", "no direction to compare at reduced scale"
    effect = (mean - claim.neutral) * math.copysign(1, claim.value - claim.neutral)
    if effect > spread:
        return "holds at reduced scale", "one seed" if seeded and len(values) == 1 else "same direction"
    if spread and effect >= -spread:
        return "differs", f"{UNDECIDED}: the interval includes no effect"
    return "differs", "other direction" if effect else "no effect"


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
