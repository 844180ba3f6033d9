"""Runs made elsewhere come home: a copied tracking database, or the claims of a run, into this workbook's MLflow."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerlab.base.errors import LayerlabError, first_problem
from layerlab.base.provenance import versions_text
from layerlab.contract.claims import ClaimResult
from layerlab.runs.record import parse_results
from layerlab.runs.tracking import store
from layerlab.runs.tracking.import_database import import_database
from layerlab.runs.tracking.imported import CLAIMS_ALONE, Imported, origins


def import_file(file: Path) -> Imported:
    """Bring runs into the tracking database, each once, however often it is done.

    Args:
        file: a sqlite tracking database, copied with or without the folder `mlartifacts` beside it, or a
            `claims.json` of `layerlab reproduce` or `layerlab publish`. It may come from anybody: nothing outside its
            own folder is read.

    Raises:
        LayerlabError: no such file, or neither of the two.
    """
    if not file.is_file():
        raise LayerlabError(f"There is no file {file}; give a tracking database (mlflow.db) or a claims.json.")
    with file.open("rb") as stream:
        database = stream.read(16) == b"SQLite format 3\0"
    if not database:
        return _import_claims(file)
    return import_database(file)


def _import_claims(file: Path) -> Imported:
    try:
        rows = parse_results(file.read_bytes())
    except ValidationError as error:
        raise LayerlabError(
            f"{file} is neither a tracking database nor a claims.json ({first_problem(error)})."
        ) from None
    found = Imported()
    by_run = lambda row: (row.paper, row.mlflow_run)  # noqa: E731
    measured = sorted((row for row in rows if row.mlflow_run), key=by_run)
    found.ignored["rows that no run has measured"] += len(rows) - len(measured)
    here: dict[str, dict[str, Any]] = {}
    for (paper, run), group in groupby(measured, by_run):
        number = store.experiment_id(paper)
        if number not in here:
            here[number] = origins(number)
        if run in here[number]:
            found.known += 1
        else:
            _make_run(file, number, list(group))
            found.new += 1
    return found


def _make_run(file: Path, experiment: str, results: list[ClaimResult]) -> None:
    """A notebook's run with nothing but its claims."""
    from mlflow.entities import Metric

    first = results[0]
    stamp = int(file.stat().st_mtime * 1000)
    made = store.client().create_run(
        experiment, start_time=stamp, run_name=f"{first.paper} · {first.profile} · notebook", tags={
            "kind": "notebook", "paper": first.paper, "profile": first.profile, "machine": first.machine,
            "commit": first.commit, store.ORIGIN: first.mlflow_run, CLAIMS_ALONE: "true",
            "versions": versions_text(first.versions),
            **store.claim_tags(result.model_dump_json() for result in results),
        })
    metrics = [Metric(name, value, stamp, 0) for name, value in store.claim_metrics(results).items()]
    store.log_metrics(made.info.run_id, metrics)
    store.client().set_terminated(made.info.run_id, "FINISHED", stamp)
