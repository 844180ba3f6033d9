"""A tracking database that was made elsewhere, brought into this workbook's MLflow run by run.

It may come from anybody: what it says of folders is believed only below its own, and no link is followed.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from layerlab.base.errors import LayerlabError
from layerlab.base.files import is_plain
from layerlab.runs.tracking import store
from layerlab.runs.tracking.imported import CLAIMS_ALONE, Imported, origins
from layerlab.runs.tracking.pages import every_run
from layerlab.runs.tracking.schema import copy_to, schema, upgrade

ENDED = ("FINISHED", "FAILED", "KILLED")
# Tags by which a run names another: ours, and MLflow's own.
PARENTS = (store.NOTEBOOK, "mlflow.parentRunId")
# Tables of what is no run → in words.
OTHERS = {"registered_models": "registered models", "trace_info": "traces", "logged_models": "logged models"}


def import_database(file: Path) -> Imported:
    """Bring the runs of a tracking database in, each once; see `import_file`.

    Raises:
        LayerlabError: no tracking database of MLflow, one of a newer MLflow, one that cannot be read.
    """
    state, _ = schema(file)
    with tempfile.TemporaryDirectory() as folder:
        # A copy: MLflow brings a database of an older version up to date in place.
        copy = Path(folder) / "mlflow.db"
        copy_to(file, copy)
        with store.quiet():
            if state == "older":
                upgrade(copy)
            return _Import(file, copy).run()


class _Import:
    """One import.

    Args:
        file: the database as it was given, beside its artifacts.
        copy: of it, to be read.
    """

    def __init__(self, file: Path, copy: Path) -> None:
        self.file = file
        self.copy = copy
        self.there = store.open_client(f"sqlite:///{copy}")
        self.found = Imported()
        # Runs that are here, by their ids here and elsewhere; and what is new here, with the tags of its parents.
        self.here: dict[str, str] = {}
        self.children: list[tuple[str, dict[str, str]]] = []

    def run(self) -> Imported:
        for experiment in self.there.search_experiments():
            try:
                self._experiment(experiment)
            except LayerlabError as error:
                self.found.lost[f"experiments: {error}"] += 1
        for number, parents in self.children:
            self._nest(number, parents)
        self._left_behind()
        return self.found

    def _experiment(self, experiment: Any) -> None:
        runs = every_run(self.there, [experiment.experiment_id])
        if not runs:
            return
        number = store.experiment_id(experiment.name)
        here = origins(number)
        self.here |= {origin: run.info.run_id for origin, run in here.items()}
        for run in runs:
            origin = run.data.tags.get(store.ORIGIN, run.info.run_id)
            before = here.get(origin) or here.get(run.info.run_id)
            if before is not None and before.info.status in ENDED and (
                run.info.status not in ENDED or run.info.end_time == before.info.end_time
            ) and CLAIMS_ALONE not in before.data.tags:
                self.found.known += 1
                continue
            try:
                self._copy(run, number, before)
            except LayerlabError as error:
                self.found.lost[f"runs: {error}"] += 1

    def _copy(self, run: Any, experiment: str, before: Any) -> None:
        """A run with its tags, parameters, datasets, metrics and artifacts; one that came before gets the rest."""
        client = store.client()
        origin = run.data.tags.get(store.ORIGIN, run.info.run_id)
        made = before or client.create_run(
            experiment, start_time=run.info.start_time, run_name=run.info.run_name, tags={store.ORIGIN: origin}
        )
        number = made.info.run_id
        try:
            if CLAIMS_ALONE in made.data.tags:
                client.delete_tag(number, CLAIMS_ALONE)
            self._log(run, number)
            self._artifacts(run, number)
            # What still ran when the database was copied was, as far as this copy goes, stopped.
            status = run.info.status if run.info.status in ENDED else "KILLED"
            client.set_terminated(number, status, run.info.end_time)
        except LayerlabError:
            if before is None:
                client.delete_run(number)
            raise
        self.found.new += 1
        self.here[origin] = self.here[run.info.run_id] = number
        parents = {tag: run.data.tags[tag] for tag in PARENTS if tag in run.data.tags}
        if parents:
            self.children.append((number, parents))

    def _log(self, run: Any, number: str) -> None:
        # The process that wrote it was another machine's, or a thing of the past.
        store.log_tags(number, {tag: value for tag, value in run.data.tags.items() if tag != store.PROCESS})
        store.log_params(number, run.data.params)
        if run.inputs and run.inputs.dataset_inputs:
            store.client().log_inputs(number, run.inputs.dataset_inputs)
        for name in run.data.metrics:
            # With their own time stamps, so that metrics that are here already are not doubled.
            store.log_metrics(number, self.there.get_metric_history(run.info.run_id, name))

    def _nest(self, number: str, parents: dict[str, str]) -> None:
        """Let a run name the run that it belongs to by the id that this one has here."""
        known = {tag: self.here[parent] for tag, parent in parents.items() if parent in self.here}
        store.log_tags(number, known)
        if known:
            self.found.nested += 1
        else:
            self.found.lost["parents of runs, which this database does not hold"] += 1

    def _artifacts(self, run: Any, number: str) -> None:
        """A run's files, as far as they lie below the database's folder."""
        place, why = artifact_place(run.info.artifact_uri, run.info.run_id, self.file.parent)
        if place is None:
            if not why:
                return
            # Of a notebook we know that there are some.
            owned = self.found.lost if why.startswith("which") or run.data.tags.get("kind") == "notebook" else \
                self.found.ignored
            owned[f"artifacts of runs, {why}"] += 1
            return
        for file in _files_below(place):
            if not is_plain(file):
                self.found.lost["links among artifacts, which layerlab does not follow"] += 1
                continue
            inside = file.parent.relative_to(place).as_posix()
            store.client().log_artifact(number, str(file), None if inside == "." else inside)
            self.found.files += 1

    def _left_behind(self) -> None:
        """Count what is no run, or was deleted."""
        with closing(sqlite3.connect(self.copy)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in OTHERS.keys() & tables:
                (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
                self.found.ignored[f"{OTHERS[table]}, which layerlab does not keep"] += count
            (count,) = database.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'deleted'").fetchone()
            self.found.ignored["deleted runs"] += count


def artifact_place(uri: str, run: str, base: Path) -> tuple[Path | None, str]:
    """The folder of a run's artifacts below the folder of its database, or None and why there is none; no reason where
    the run has logged none.

    What a database says is believed only where it ends as MLflow's do, in the run's id and `artifacts`, and leads,
    links resolved, to a folder below `base`. A folder that was copied along is looked for under the names that its last
    four parts have: `mlartifacts/<experiment>/<run>/artifacts`.
    """
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file", "mlflow-artifacts"):
        return None, f"which are kept at {parsed.scheme}:"
    path = Path(uri if not parsed.scheme else url2pathname(parsed.path))
    if ".." in path.parts or path.parts[-2:] != (run, "artifacts"):
        return None, "which the database keeps in a folder that is not a run's own"
    places = [base / path, base.joinpath(*path.parts[-4:]), base.joinpath("mlartifacts", *path.parts[-3:])]
    real = Path(os.path.realpath(base))
    for place in places:
        if place.is_dir() and Path(os.path.realpath(place)).is_relative_to(real):
            return place, ""
    if places[0].is_dir():
        return None, f"which lie outside the folder {base}"
    if Path(os.path.realpath(path)).is_relative_to(real) or base.joinpath(*path.parts[-4:-2]).is_dir():
        return None, ""
    return None, "whose folder mlartifacts is not beside the database"


def _files_below(folder: Path) -> Iterator[Path]:
    """Files, and links of any kind, none of which is followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root) / name for name in sorted(files))
        yield from (Path(root) / name for name in sorted(folders) if (Path(root) / name).is_symlink())
