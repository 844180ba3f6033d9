"""Whether what a run left was made by the code that its plugin has today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from layerlab.base.digests import same_code
from layerlab.base.errors import LayerlabError
from layerlab.base.files import is_plain
from layerlab.contract.paper import Paper
from layerlab.runs.record import IDENTITY, RESULTS, read_object

# The file of a plugin that draws; the numbers do not depend on it.
PICTURES = "pictures.py"
State = Literal["today's code", "older code", "older pictures"]
TODAY: State = "today's code"
# Files that are named; the rest is counted.
NAMED = 3


class Age(NamedTuple):
    """What of a run is older than its plugin's code.

    Attributes:
        numbers: what has changed since in the code that makes them; empty where nothing has.
        figures: the same of the code that draws.
    """

    numbers: str = ""
    figures: str = ""

    @property
    def why(self) -> str:
        """Whichever there is."""
        return self.numbers or self.figures


def age(folder: Path, paper: Paper) -> Age:
    """Whether the files of a plugin, all but its `paper.toml`, are the ones that a run noted in its identity.

    Args:
        folder: of the run, or where it is kept.
        paper: of the plugin that is installed.
    """
    if not is_plain(folder / IDENTITY):
        return Age("the run noted no code (an older version of layerlab made it)")
    try:
        noted = TypeAdapter(dict[str, dict[str, str]]).validate_python(read_object(folder, IDENTITY).get("code"))
    except (ValidationError, LayerlabError):
        return Age("the run's identity.json cannot be read")
    return _age_of(noted.get("plugin", {}), paper.folder)


def _age_of(noted: Mapping[str, str], package: Path) -> Age:
    names = {file.relative_to(package).as_posix() for file in package.rglob("*.py")} | set(noted)
    changed = sorted(name for name in names if not same_code(noted.get(name, ""), package / name))
    numbers = [name for name in changed if name != PICTURES]
    return Age(_listed(numbers), _listed(changed) if len(changed) > len(numbers) else "")


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} changed since"


class Kept(NamedTuple):
    """A profile that is kept among the results."""

    paper: str
    profile: str
    state: State
    why: str


def kept_ages(target: Path, papers: list[Paper]) -> list[Kept]:
    """Every profile that is kept of some papers, and whether today's code made it."""
    found = []
    for paper in papers:
        for file in sorted((target / paper.strategy).glob(f"[!.]*/{RESULTS}")):
            its = age(file.parent, paper)
            state: State = TODAY
            if its.why:
                state = "older code" if its.numbers else "older pictures"
            found.append(Kept(paper.strategy, file.parent.name, state, its.why))
    return found


def check_age(folder: Path, paper: Paper, profile: str) -> None:
    """Raises: LayerlabError: other code made a run than stands in its plugin today."""
    if why := age(folder, paper).why:
        raise LayerlabError(
            f"{folder} was made by other code than {paper.strategy!r} has today: {why}; run `layerlab reproduce "
            f"{paper.strategy} --profile {profile} --rerun` and publish that."
        )
