"""A paper's tables and claims as data, and what a measurement says of a claim."""

from __future__ import annotations

import importlib.util
import math
import tomllib
import warnings
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from layerlab.base.errors import LayerlabError, LayerlabWarning, sentence, unknown
from layerlab.base.names import NAME, FileName
from layerlab.base.text import as_json
from layerlab.contract.claims import Claim, ClaimResult, Data
from layerlab.contract.headings import Heading
from layerlab.contract.headline import Headline
from layerlab.contract.parameters import Parameters, differing, merged_parameters
from layerlab.contract.registry import Plugin
from layerlab.contract.verdicts import judge
from layerlab.show.table import Table

if TYPE_CHECKING:
    import pandas as pd


class NoPaper(LayerlabError):
    """A plugin brings a strategy and no paper."""


def paper_table(paper: Paper) -> Table:
    """One row a claim, under the paper's title and summary."""
    rows = [(claim.id, claim.statement, f"{claim.value:g} {claim.unit}", claim.where) for claim in paper.claims]
    return Table(("claim", "statement", "published", "where"), rows,
                 f"{paper.authors}: {paper.title}. {paper.venue}, {paper.year}.",
                 [" ".join(paper.summary.split()), f"Profiles: {', '.join(paper.profiles)}."])


class PublishedTable(Data):
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


class Profile(Data):
    """A set of values for the notebook's parameters.

    Attributes:
        description: what it runs on and how long it takes.
        like: another profile of the paper, whose values it has where it gives none itself.
        parameters: name → value; those of `like` included.
        cores: threads that a run should have; `all` keeps the machine to itself, for runs that are long or that time
            what they do.
        memory_gb: host memory that a run may take, in 10⁹ bytes.
    """

    description: str
    like: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    cores: PositiveInt | Literal["all"] = 1
    memory_gb: PositiveFloat = 2.0


class Paper(Data):
    """What a plugin's `paper.toml` says.

    Attributes:
        title, authors, year, venue, link: bibliographic.
        summary: the paper in three sentences.
        formula: its central equation, in LaTeX.
        notebook: file name, beside `paper.toml`.
        tables, claims, profiles: see their classes.
        targets: what this project asks of the method, judged as claims are and counted apart from them.
        headline: what its one sentence tells; None where it tells how many claims hold.
        headings: a run's table → column → how a page heads it; see `headings_of`.
    """

    title: str
    authors: str
    year: int
    venue: str
    link: str = ""
    summary: str
    formula: str
    notebook: str
    tables: list[PublishedTable] = Field(default_factory=list)
    claims: list[Claim]
    targets: list[Claim] = Field(default_factory=list)
    profiles: dict[FileName, Profile]
    headline: Headline | None = None
    headings: dict[str, dict[str, Heading]] = Field(default_factory=dict)
    strategy: str = ""
    folder: Path = Path()

    @field_validator("profiles", mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        """Each profile with what it has from the one that it is like."""
        if not isinstance(value, dict):
            return value
        return {name: _filled(name, value, ()) for name in value}

    @model_validator(mode="after")
    def _headline_is_of_its_claims(self) -> Paper:
        if self.headline:
            self.headline.check(self.everything)
        return self

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
        return paper_table(self).text()

    def _repr_html_(self) -> str:
        return paper_table(self)._repr_html_()

    def judged(self, result: ClaimResult) -> ClaimResult:
        """A row judged by today's rules and today's claim, whichever version wrote it.

        A claim that the paper no longer has keeps its own verdict.
        """
        claim = self._claims.get(result.claim)
        if claim is None:
            return result
        values = [math.nan if value is None else value for value in result.values]
        verdict, reason = judge(claim, values, result.conditions, bool(result.seeds), result.observed,
                                result.by_model)
        return result.model_copy(update={
            "statement": claim.statement, "where": claim.where, "unit": claim.unit, "paper_value": claim.value,
            "ours": claim in self.targets, "published_share": published_share(claim, result.measured),
            "verdict": verdict, "reason": reason,
        })

    def table(self, id: str) -> PublishedTable:
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
        if id not in self._claims:
            raise unknown("claim", id, self._claims)
        return self._claims[id]

    @cached_property
    def _claims(self) -> dict[str, Claim]:
        """The claims and the targets, by their ids."""
        return {claim.id: claim for claim in self.everything}

    def not_run(self, claim: Claim, profile: str) -> ClaimResult:
        """The row of a claim that nothing was measured of."""
        return ClaimResult(
            paper=self.strategy, claim=claim.id, statement=claim.statement, where=claim.where, unit=claim.unit,
            paper_value=claim.value, profile=profile, ours=claim in self.targets,
        )

    @property
    def everything(self) -> list[Claim]:
        """The paper's claims, then this project's own targets."""
        return [*self.claims, *self.targets]

    def parameters(self, profile: str, given: Mapping[str, Any]) -> Parameters:
        """A profile's parameters with those that were given in their place.

        Raises:
            LayerlabError: no such profile or parameter, or a value of another kind.
        """
        return merged_parameters(f"the {self.strategy} notebook", self.profile(profile).parameters, given)

    def differing(self, profile: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a run that are not as a profile has them today; all, where there is no such profile.

        Args:
            parameters: in force when it ran. One that the profile has and the run did not know is None.
        """
        usual = self.profiles[profile].parameters if profile in self.profiles else {}
        return differing(as_json(usual), parameters)

    def placed(self, result: ClaimResult, parameters: Mapping[str, Any]) -> ClaimResult:
        """A row judged anew that says which parameters of its run are not as its profile has them today.

        A claim that follows from shapes alone is the same whatever they are.

        Args:
            parameters: in force when it ran.
        """
        claim = self._claims.get(result.claim)
        changed = {} if claim and claim.analytic else self.differing(result.profile, parameters)
        return self.judged(result.model_copy(update={"changed": changed}))

    def profile(self, name: str) -> Profile:
        """The run profile of that name.

        Raises:
            LayerlabError: there is none.
        """
        if name not in self.profiles:
            raise unknown("profile", name, self.profiles)
        return self.profiles[name]


def _filled(name: str, profiles: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    """A profile's own content over that of the one it is like.

    Raises:
        ValueError: there is no such profile, or a circle of them.
    """
    content = profiles[name]
    like = content.get("like") if isinstance(content, dict) else None
    if not like:
        return content
    if like not in profiles:
        raise ValueError(f"profile {name!r} is like {like!r}, which there is not")
    if like in (name, *above):
        raise ValueError(f"profiles are like each other in a circle: {', '.join((*above, name, like))}")
    base = _filled(like, profiles, (*above, name))
    parameters = {**base.get("parameters", {}), **content.get("parameters", {})}
    return {**base, **content, "parameters": parameters}


def published_share(claim: Claim, measured: float | None) -> float | None:
    """Measured ÷ published effect; None where nothing was measured or the paper claims no effect."""
    published = claim.value - (claim.neutral or 0.0)
    if measured is None or published == 0:
        return None
    return (measured - (claim.neutral or 0.0)) / published


def read_paper(file: Path, strategy: str) -> Paper:
    """Read a `paper.toml`.

    Raises:
        NoPaper: missing.
        LayerlabError: no TOML, or not of `Paper`'s form.
    """
    try:
        # Read each time, so that whoever records what is used hears of it.
        return _parsed(file.read_text(encoding="utf-8"), file, strategy)
    except FileNotFoundError:
        raise NoPaper(f"Strategy {strategy!r} has no {file}; a plugin keeps its paper.toml there.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, OSError) as error:
        raise LayerlabError(f"{file} cannot be read: {error}.") from None
    except ValidationError as error:
        raise LayerlabError(sentence(error, str(file), Paper.model_fields)) from None


# A plan asks for the paper of each of its thousands of jobs, and a paper takes milliseconds.
@lru_cache(maxsize=64)
def _parsed(text: str, file: Path, strategy: str) -> Paper:
    """A paper from the text of its file."""
    return Paper(**tomllib.loads(text), strategy=strategy, folder=file.parent)


def load_paper(strategy: str | Plugin) -> Paper:
    """The paper of an installed strategy: `paper.toml` in the package that its entry point names.

    The package is not imported, so a program that only starts its notebook needs no torch.

    Raises:
        LayerlabError: no such strategy, or no readable paper.

    Example:
        >>> from layerlab import load_paper, strategies
        >>> paper = load_paper(next(iter(strategies)))
        >>> "quick" in paper.profiles
        True
    """
    if isinstance(strategy, str):
        from layerlab.contract.registry import strategies

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
    from layerlab.contract.registry import strategies

    papers = []
    for name in strategies:
        try:
            papers.append(load_paper(name))
        except LayerlabError as error:
            warnings.warn(f"{name} is left out: {error}", LayerlabWarning, stacklevel=3)
    return papers
