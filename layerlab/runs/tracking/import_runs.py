"""Runs made elsewhere come home: a copied tracking database, or the claims of a run, into this workbook's MLflow."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerlab.base.errors import LayerlabError, first_line, first_problem
from layerlab.base.provenance import versions_text
from layerlab.runs.record import parse_results
from layerlab.runs.tracking import store

PARAMS_AT_ONCE = 100  # MLflow's limit for one call
ENDED = ("FINISHED", "FAILED", "KILLED")
# Tag of a run that came as a claims.json: whatever its times, it lacks what its database holds.
CLAIMS_ALONE = f"{store.PREFIX}claims-alone"


def import_file(file: Path) -> tuple[int, int]:
    """Bring runs into the tracking database, each once, however often it is done.

    Args:
        file: a sqlite tracking database, copied with or without the folder `mlartifacts` beside it, or a
            `claims.json` of `layerlab reproduce` or `layerlab publish`.

    Returns:
        (runs that are new or have got further, runs that were here already).

    Raises:
        LayerlabError: no such file, or neither of the two.
    """
    if not file.is_file():
        raise LayerlabError(f"There is no file {file}; give a tracking database (mlflow.db) or a claims.json.")
    with file.open("rb") as stream:
        database = stream.read(16) == b"SQLite format 3\0"
    return _import_database(file) if database else _import_claims(file)


def _import_claims(file: Path) -> tuple[int, int]:
    try:
        rows = parse_results(file.read_bytes())
    except ValidationError as error:
        raise LayerlabError(
            f"{file} is neither a tracking database nor a claims.json ({first_problem(error)})."
        ) from None
    from mlflow.entities import Metric

    new = known = 0
    by_run = lambda row: (row.paper, row.mlflow_run)  # noqa: E731
    measured = sorted((row for row in rows if row.mlflow_run), key=by_run)
    here: dict[str, set[str]] = {}
    for (paper, run), group in groupby(measured, by_run):
        results = list(group)
        number = store.experiment_id(paper)
        if number not in here:
            here[number] = set(_origins(number))
        if run in here[number]:
            known += 1
            continue
        first = results[0]
        stamp = int(file.stat().st_mtime * 1000)
        made = store.client().create_run(
            number, start_time=stamp, run_name=f"{paper} · {first.profile} · notebook", tags={
                "kind": "notebook", "paper": paper, "profile": first.profile, "machine": first.machine,
                "commit": first.commit, store.ORIGIN: run, CLAIMS_ALONE: "true",
                "versions": versions_text(first.versions),
                **store.claim_tags(result.model_dump_json() for result in results),
            })
        metrics = [Metric(name, value, stamp, 0) for name, value in store.claim_metrics(results).items()]
        store.log_metrics(made.info.run_id, metrics)
        store.client().set_terminated(made.info.run_id, "FINISHED", stamp)
        new += 1
    return new, known


def _origins(experiment: str) -> dict[str, Any]:
    """The runs of an experiment by their ids, and by the ids that they had elsewhere."""
    found = {}
    for run in _runs(store.client(), experiment):
        found[run.info.run_id] = found[run.data.tags.get(store.ORIGIN, run.info.run_id)] = run
    return found


def _runs(client: Any, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _import_database(file: Path) -> tuple[int, int]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    new = known = 0
    with tempfile.TemporaryDirectory() as folder:
        # A copy: MLflow brings a database of an older version up to date in place.
        copy = Path(folder) / "mlflow.db"
        try:
            with closing(sqlite3.connect(f"file:{file.resolve()}?mode=ro", uri=True)) as source:
                with closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            with store.quiet():
                there = MlflowClient(f"sqlite:///{copy}")
                experiments = there.search_experiments()
        except (sqlite3.Error, MlflowException) as error:
            raise LayerlabError(
                f"{file} cannot be read as a tracking database ({first_line(error)}); copy it again while "
                "nothing writes to it."
            ) from None
        for experiment in experiments:
            runs = list(_runs(there, experiment.experiment_id))
            if not runs:
                continue
            number = store.experiment_id(experiment.name)
            here = _origins(number)
            # Notebooks first, so that what belongs to them finds them.
            for run in sorted(runs, key=lambda run: store.NOTEBOOK in run.data.tags):
                origin = run.data.tags.get(store.ORIGIN, run.info.run_id)
                before = here.get(origin) or here.get(run.info.run_id)
                if before is not None and before.info.status in ENDED and (
                    run.info.status not in ENDED or run.info.end_time == before.info.end_time
                ) and CLAIMS_ALONE not in before.data.tags:
                    known += 1
                    continue
                here[origin] = _copy(there, run, number, before, here, file)
                here[run.info.run_id] = here[origin]
                new += 1
    return new, known


def _copy(there: Any, run: Any, experiment: str, before: Any, here: dict[str, Any], file: Path) -> Any:
    """A run with its tags, parameters, datasets, metrics and artifacts; one that came before gets the rest."""
    from mlflow.entities import Param, RunTag

    client = store.client()
    origin = run.data.tags.get(store.ORIGIN, run.info.run_id)
    # The process that wrote it was another machine's, or a thing of the past.
    tags = {name: value for name, value in run.data.tags.items() if name != store.PROCESS}
    notebook = here.get(tags.get(store.NOTEBOOK, ""))
    if notebook is not None:
        tags[store.NOTEBOOK] = notebook.info.run_id
    made = before or client.create_run(
        experiment, start_time=run.info.start_time, run_name=run.info.run_name, tags={store.ORIGIN: origin}
    )
    number = made.info.run_id
    if CLAIMS_ALONE in made.data.tags:
        client.delete_tag(number, CLAIMS_ALONE)
    client.log_batch(number, tags=[RunTag(name, value) for name, value in tags.items()])
    params = [Param(name, value) for name, value in run.data.params.items()]
    for start in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(number, params=params[start : start + PARAMS_AT_ONCE])
    if run.inputs and run.inputs.dataset_inputs:
        client.log_inputs(number, run.inputs.dataset_inputs)
    for name in run.data.metrics:
        # With their own time stamps, so that metrics that are here already are not doubled.
        store.log_metrics(number, there.get_metric_history(run.info.run_id, name))
    original = Path(run.info.artifact_uri.removeprefix("file://"))
    for place in (original, file.parent.joinpath(*original.parts[-4:])):
        if place.is_dir():
            client.log_artifacts(number, str(place))
            break
    # What still ran when the database was copied was, as far as this copy goes, stopped.
    client.set_terminated(number, run.info.status if run.info.status in ENDED else "KILLED", run.info.end_time)
    return client.get_run(number)
