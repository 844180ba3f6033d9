"""Two runs of a paper side by side: what differed between them, and which claims moved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from layerlab.base.errors import LayerlabError, first_problem
from layerlab.contract.claims import ClaimResult
from layerlab.contract.identity import Identity
from layerlab.contract.paper import load_paper
from layerlab.reporting.scoreboard import verdict_cell
from layerlab.runs import tracking
from layerlab.runs.record import IDENTITY, read_object, read_parameters, read_results
from layerlab.show.table import Cell, Table


@dataclass(frozen=True)
class Finished:
    """What is known of a finished run.

    Attributes:
        name: as it was asked for.
        rows: its claims, judged by today's rules.
        facts: what it comes from, part by part: (part, name) → value.
    """

    name: str
    rows: list[ClaimResult]
    facts: dict[tuple[str, str], str]


def diff(first: str, second: str) -> list[Table]:
    """What differed between two runs, and which claims moved.

    Args:
        first, second: the output folder of a run, a published profile's folder, or the id of a result or of a run in
            MLflow.

    Raises:
        LayerlabError: no such run, or two of different papers.
    """
    one, other = find_run(first), find_run(second)
    papers = [{row.paper for row in run.rows} for run in (one, other)]
    if papers[0] != papers[1]:
        raise LayerlabError(f"{first} is a run of {', '.join(papers[0])}, {second} of {', '.join(papers[1])}; name two "
                            "of one paper.")
    header = ("", "", first, second)
    differed = [[part, name, one.facts.get((part, name), "—"), other.facts.get((part, name), "—")]
                for part, name in dict.fromkeys([*one.facts, *other.facts])
                if one.facts.get((part, name)) != other.facts.get((part, name))]
    notes = () if differed else ("Nothing that is known of them differs.",)
    return [Table(header, differed, "What differed", notes), _moved(one, other)]


def _moved(one: Finished, other: Finished) -> Table:
    """The claims that say something else, with both measurements."""
    rows: list[list[str | Cell]] = []
    before, after = _by_claim(one.rows), _by_claim(other.rows)
    for key in dict.fromkeys([*before, *after]):
        pair = [before.get(key), after.get(key)]
        said = [(row.measured_text, row.verdict) if row else None for row in pair]
        if said[0] != said[1]:
            statement = next(row.statement for row in pair if row)
            cells: list[str | Cell] = [statement]
            for row in pair:
                cells += [row.measured_text, verdict_cell(row.verdict)] if row else ["—", "—"]
            rows.append(cells)
    note = f"{len(before.keys() & after.keys()) - len(rows)} claims say the same." if rows else "No claim moved."
    return Table(("claim", one.name, "verdict", other.name, "verdict"), rows, "Which claims moved", [note])


def _by_claim(rows: list[ClaimResult]) -> dict[tuple[str, str, str], ClaimResult]:
    return {(row.claim, str(row.conditions.get("dataset", "")), str(row.conditions.get("network", ""))): row
            for row in rows}


def find_run(name: str) -> Finished:
    """A finished run by its folder, by the id of its result or by its id in MLflow.

    Raises:
        LayerlabError: there is none.
    """
    if Path(name).is_dir():
        return _of_folder(name, Path(name))
    run = tracking.find_notebook_run(name)
    if run is None:
        raise LayerlabError(f"There is no run {name!r}: neither a folder, nor the id of a result or of a run in "
                            f"{tracking.tracking_uri()}; `layerlab scoreboard` lists them.")
    with tempfile.TemporaryDirectory() as temporary:
        tracking.download(run.info.run_id, Path(temporary))
        return _of_folder(name, Path(temporary))


def _of_folder(name: str, folder: Path) -> Finished:
    rows = read_results(folder)
    if not rows:
        raise LayerlabError(f"{name} holds a run without any claim; name another.")
    paper = load_paper(rows[0].paper)
    some = next((row for row in rows if row.machine), rows[0])
    facts = {("run", "profile"): some.profile, ("run", "machine"): some.machine, ("run", "commit"): some.commit}
    facts |= {("version", package): version for package, version in some.versions.items()}
    facts |= {("parameter", key): json.dumps(value, ensure_ascii=False)
              for key, value in read_parameters(folder).items()}
    facts |= dict(_identity_facts(folder))
    return Finished(name, [paper.judged(row) for row in rows], facts)


def _identity_facts(folder: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """What `identity.json` says besides the parameters; nothing for a run of an older version, which has none."""
    if not (folder / IDENTITY).exists():
        return
    content = read_object(folder, IDENTITY)
    content.pop("id", None)
    try:
        identity = Identity(**content)
    except ValidationError as error:
        raise LayerlabError(f"{folder / IDENTITY} does not say what a run comes from ({first_problem(error)}); run it "
                            "again, with --rerun.") from None
    for source, fingerprint in identity.data.items():
        yield ("data", Path(source).name), fingerprint
    for owner, files in identity.code.items():
        for file, digest in files.items():
            yield (f"code of {owner}", file), digest
