"""MLflow: where runs are logged, and the observer that logs a fit.

A fit is one run, found by its tags. Metrics are written with the time stamps that the history keeps, so that writing
an epoch again after an interruption changes nothing.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse
from urllib.request import url2pathname

from filelock import FileLock

from layerlab.base.errors import LayerlabError, LayerlabWarning, first_line
from layerlab.base.files import write_atomically
from layerlab.base.folder_lock import acquire_lock
from layerlab.base.names import file_name, marked
from layerlab.base.provenance import provenance, versions, versions_text
from layerlab.base.usage import note_absent
from layerlab.runs.record import DATABASE, workbook_folder
from layerlab.runs.tracking.database import PATIENCE, check_file, wait_for_database
from layerlab.runs.tracking.pages import every_run
from layerlab.runs.tracking.schema import copy_to, schema, sqlite_file, sqlite_uri, upgrade, without_password
from layerlab.runs.tracking.writer import is_alive, this_machine, this_process
from layerlab.show.progress import say

PREFIX = "layerlab."
# Tags of a notebook's run, one a row of its scoreboard, numbered.
CLAIM = f"{PREFIX}claim."
# Tag of a fit's run: the run of the notebook that it belongs to. Not MLflow's own nesting, whose UI shows what a
# search finds folded away under its parent.
NOTEBOOK = f"{PREFIX}notebook"
# Tag of a notebook's run: the parameters in force, in JSON.
PARAMETERS = f"{PREFIX}parameters"
# Tag of a notebook's run and of the fits that belong to it: the id of what they come from.
RESULT = f"{PREFIX}result"
# Tag of the seeds of an arm, and of the run that holds their mean.
GROUP = f"{PREFIX}group"
LONGEST_TAG = 8000  # MLflow's limit
# Tag of the process that writes a run, by which a run that nobody writes any more is known.
PROCESS = f"{PREFIX}process"
# Tag of a run that came from another database: its id there.
ORIGIN = f"{PREFIX}origin"
# MLflow's limits: for one call, and in characters of a name.
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
LONGEST_KEY = 250


def tracking_uri() -> str:
    """`$MLFLOW_TRACKING_URI`, else a sqlite database in the workbook's folder.

    A relative path of a sqlite database counts from the current folder, as MLflow has it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return sqlite_uri(workbook_folder() / DATABASE)
    file = sqlite_file(given)
    return sqlite_uri(file) if file is not None and "?" not in given else given


def key(name: str) -> str:
    """A name that MLflow takes for a metric, a parameter or a tag: the name itself where it does.

    It takes letters, digits and `_ - . : /` and spaces, 250 of them, and nothing that is a path to elsewhere. Another
    name keeps what it can, with a mark of the whole, so that two names stay two.

    Example:
        >>> key("test/top1"), key("share (%)")
        ('test/top1', 'share ___-2275106f')
    """
    parts = re.sub(r"[^/\w.\- :]", "_", name).split("/")
    like = "/".join(part for part in parts if part not in ("", ".", ".."))
    return name if like == name and 0 < len(name) <= LONGEST_KEY else marked(like, name, LONGEST_KEY)


@contextlib.contextmanager
def quiet(silent: bool = False) -> Iterator[None]:
    """Keep alembic's and MLflow's start-up lines out of notebooks, or all that they print."""
    import logging

    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL if silent else logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class NotTracked(LayerlabError):
    """What MLflow, its database or its server does not do.

    Attributes:
        code: MLflow's for it, if it is its own.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def as_sentence(uri: str = "") -> Iterator[None]:
    """What MLflow and its database raise in the block, as one sentence without a password.

    Raises:
        NotTracked: they raise.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, RequestException, ImportError, OSError) as error:
        remedy = "set MLFLOW_TRACKING_URI to a database or server that can be written"
        reason = first_line(_told_plainly(error))
        if isinstance(error, ImportError):
            remedy = "install the driver of this database with pip, or " + remedy
        elif "disk is full" in reason:
            remedy = "make room there, or " + remedy
        what = without_password(f"Runs cannot be tracked at {uri or tracking_uri()} ({reason})")
        raise NotTracked(f"{what}; {remedy}.", getattr(error, "error_code", "")) from None


def _told_plainly(error: Exception) -> Exception:
    """The same without the advice on SQLAlchemy's sessions that stands before the database's own words."""
    text = re.sub(r"\(raised as a result of [^\n]*\)\n", "", str(error))
    return error if text == str(error) else Exception(text)


class _Client:
    """MLflow's client, whose errors are sentences."""

    def __init__(self, uri: str, shown: str = "") -> None:
        _settle()
        from mlflow import MlflowClient

        self._uri = shown or uri
        with quiet(silent=True), as_sentence(self._uri):
            self._client = MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def told(*arguments: Any, **options: Any) -> Any:
            with as_sentence(self._uri):
                return call(*arguments, **options)

        return told


def open_client(uri: str) -> Any:
    """MLflow's client of a database that is up to date, whose errors are sentences."""
    return _Client(uri)


@cache
def _client(uri: str) -> Any:
    """A client for a tracking URI, whose sqlite database exists and is migrated.

    Processes that meet an empty database at once crash in MLflow's migration, so the first one makes it under a lock.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_sentence(uri))
        stack.enter_context(quiet(silent=True))
        database = sqlite_file(uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{database}.lock")
            acquire_lock(lock, -1, f"Another process prepares the tracking database {database}", say)
            stack.callback(lock.release)
            check_file(database)
        wait_for_database(uri, PATIENCE)
        if database is not None:
            _bring_up(database)
        client = _Client(uri)
        _close_dead_runs(client)
    return client


def _bring_up(file: Path) -> None:
    """Make a database that is not there yet, whole or not at all, or bring one of an older MLflow up to date, which
    that one cannot read any more: a copy is kept."""
    state, revision = schema(file)
    if state == "none":
        for left in file.parent.glob(f".{glob.escape(file.name)}.*new*"):  # of a try that was killed, or had no room
            left.unlink()
        # With a name of its own: MLflow goes on with what it has once opened under a name.
        new = file.with_name(f".{file.name}.{uuid.uuid4().hex}.new")
        _fill(new, (file.parent / "mlruns").as_uri())
        os.replace(new, file)
    if state == "older":
        kept = file.with_name(f"{file.name}.{revision}")
        copy_to(file, kept)
        with quiet():
            upgrade(file)
        warnings.warn(f"{file} was written by an older MLflow and is brought up to the one that is installed; {kept} "
                      "is the database as it was.", LayerlabWarning, stacklevel=2)


def _fill(file: Path, artifacts: str) -> None:
    """Make MLflow's tables in a new database.

    Args:
        file: the database's.
        artifacts: address for the artifacts of MLflow's own experiment `Default`. MLflow takes the current folder's by
            itself, and writes its path into SQL as it is, where quotes and colons mean something.
    """
    _settle()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = sqlite_uri(file)
    with quiet(silent=True), as_sentence(uri):
        SqlAlchemyStore(uri, artifacts).search_experiments()


def _settle() -> None:
    """MLflow's settings, where the environment has none: a server that is down is not waited for for minutes."""
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def client() -> Any:
    """The MLflow client of `tracking_uri`.

    Raises:
        LayerlabError: the database or server cannot be reached; a sqlite database that is none of MLflow's, or of a
            newer one.
    """
    return _client(tracking_uri())


# Copies of databases that are read, for as long as this process lives.
_copies: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _copied(file: Path, changed: int) -> Any:
    _copies.append(tempfile.TemporaryDirectory(prefix="layerlab-"))
    copy = Path(_copies[-1].name) / DATABASE
    copy_to(file, copy)
    with quiet():
        upgrade(copy)
    return _Client(sqlite_uri(copy), sqlite_uri(file))


def reader() -> Any:
    """The same client where nothing is to be written; None where there is no database yet.

    A database of an older MLflow stays as it is: what is read is a copy of it.

    Raises:
        LayerlabError: as `client`.
    """
    file = sqlite_file(tracking_uri())
    if file is None:
        return client()
    state, _ = schema(file)
    if state == "none":
        note_absent(file)
        return None
    return _copied(file, file.stat().st_mtime_ns) if state == "older" else _Client(tracking_uri())


def experiment_id(name: str) -> str:
    """The experiment of that name, made if need be, with its artifacts beside the database.

    Raises:
        LayerlabError: it was deleted in MLflow; MLflow does not take the name.
    """
    found = client().get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(tracking_uri())
        location = (file.parent / "mlartifacts" / file_name(name)).as_uri() if file is not None else None
        try:
            # Otherwise MLflow's UI opens on its pages for language models.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return client().create_experiment(name, artifact_location=location, tags=tags)
        except LayerlabError:
            # Another process was faster.
            found = client().get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        uri = without_password(tracking_uri())
        raise LayerlabError(
            f"The experiment {name!r} was deleted in MLflow; bring it back with `MLFLOW_TRACKING_URI={uri} mlflow "
            f"experiments restore --experiment-id {found.experiment_id}`, or remove it for good with `mlflow gc`."
        )
    return found.experiment_id


def common_tags() -> dict[str, str]:
    """Where a run is made, as its tags."""
    return provenance() | {"versions": versions_text(versions())}


def claim_tags(rows: Iterable[str]) -> dict[str, str]:
    """The rows of a scoreboard, in JSON, as tags of the notebook's run."""
    return {f"{CLAIM}{number:03}": row for number, row in enumerate(rows)}


def parameter_tag(values: Mapping[str, Any]) -> dict[str, str]:
    """The parameters in force as a tag of the notebook's run; none where MLflow would not take it."""
    text = json.dumps(values, ensure_ascii=False)
    return {PARAMETERS: text} if len(text) <= LONGEST_TAG else {}


def run_parameters(run: Any) -> dict[str, Any] | None:
    """The parameters that were in force in a notebook's run; None where it did not note them."""
    try:
        found = json.loads(run.data.tags[PARAMETERS])
    except (KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def tag_results(run_id: str, result: str) -> None:
    """Put a result's id on a notebook's run and on the fits that belong to it."""
    experiment = client().get_run(run_id).info.experiment_id
    fits = every_run(client(), [experiment], f"tags.`{NOTEBOOK}` = '{run_id}'")
    for each in [run_id, *(fit.info.run_id for fit in fits)]:
        client().set_tag(each, RESULT, result)


def claim_metrics(results: Iterable[Any]) -> dict[str, float]:
    """What the UI shows of a scoreboard's rows as metrics of the notebook's run: `claim/<id>[/<dataset>]`, and
    `…/<network>` where several networks have one of that name."""
    measured = [result for result in results if result.measured is not None]

    def name(result: Any, *conditions: str) -> str:
        return "/".join(["claim", result.claim, *(str(result.conditions[each]) for each in conditions
                                                  if each in result.conditions)])

    short = Counter(name(result, "dataset") for result in measured)
    return {name(result, "dataset", *(["network"] if short[name(result, "dataset")] > 1 else [])): result.measured
            for result in measured}


def claim_rows(run: Any) -> list[str]:
    """What `claim_tags` made of a scoreboard, in its order."""
    return [value for name, value in sorted(run.data.tags.items()) if name.startswith(CLAIM)]


def notebook_runs(paper: str) -> list[Any]:
    """The finished runs of a paper's notebook, the newest first."""
    found = found_experiment(paper)
    if found is None:
        return []
    return every_run(reader(), [found.experiment_id], "tags.kind = 'notebook' AND attributes.status = 'FINISHED'",
                     order_by=["attributes.start_time DESC"])


def find_notebook_run(name: str) -> Any | None:
    """The newest run of a notebook that has this id, or whose result has it; None if there is none."""
    there = reader()
    if there is None or not name.isalnum():
        return None
    every = [experiment.experiment_id for experiment in there.search_experiments()]
    for wanted in (f"tags.`{RESULT}` = '{name}' AND tags.kind = 'notebook'", f"attributes.run_id = '{name}'"):
        found = there.search_runs(every, wanted, order_by=["attributes.start_time DESC"], max_results=1)
        if found:
            return found[0]
    return None


def run_url(experiment: str, run_id: str) -> str:
    """Where the UI shows a run: on the tracking server, or where `make ui` puts it."""
    # Without the user and the password that a server may ask for.
    uri = re.sub("(?<=://)[^/]*@", "", tracking_uri())
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment}/runs/{quote(run_id)}"


def found_experiment(name: str) -> Any:
    """The experiment of that name, to be read; None where there is none."""
    there = reader()
    return there.get_experiment_by_name(name) if there is not None else None


def _close_dead_runs(client: Any) -> None:
    """Mark runs as killed that processes of this machine were writing and that are gone.

    A study that goes on sets its runs running again.
    """
    numbers = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"attributes.status = 'RUNNING' AND tags.`{PROCESS}` LIKE '{this_machine()}:%'"
    for run in every_run(client, numbers, wanted):
        if not is_alive(run.data.tags[PROCESS]):
            client.set_terminated(run.info.run_id, "KILLED")


def start_run(experiment: str, name: str, attempt: str, tags: Mapping[str, str]) -> str:
    """The run of this attempt: the one that an interrupted process had begun, or a new one. Returns its id."""
    run_id = find_run(experiment, attempt)
    if run_id:
        client().set_tag(run_id, PROCESS, this_process())
        client().update_run(run_id, status="RUNNING")
        return run_id
    return create_run(experiment, name, attempt, tags, this_process())


def find_run(experiment: str, attempt: str) -> str:
    """The id of an attempt's run; empty where there is none."""
    found = client().search_runs([experiment_id(experiment)], f"tags.`{PREFIX}attempt` = '{attempt}'", max_results=1)
    return found[0].info.run_id if found else ""


def create_run(experiment: str, name: str, attempt: str, tags: Mapping[str, str], writer: str) -> str:
    """A new run of an attempt; gives its id.

    Args:
        writer: the process that it is of, see `this_process`.
    """
    own = {f"{PREFIX}attempt": attempt, PROCESS: writer}
    given = {key(tag): value for tag, value in tags.items()}
    return client().create_run(experiment_id(experiment), run_name=name, tags=given | own).info.run_id


def log_metrics(run_id: str, metrics: Sequence[Any]) -> None:
    """Log any number of MLflow's `Metric`s, in as few calls as it takes them, under names that it takes."""
    from mlflow.entities import Metric

    valid = [Metric(key(metric.key), metric.value, metric.timestamp, metric.step) for metric in metrics]
    for start in range(0, len(valid), METRICS_AT_ONCE):
        client().log_batch(run_id, metrics=valid[start : start + METRICS_AT_ONCE])


def log_tags(run_id: str, tags: Mapping[str, str]) -> None:
    """Log any number of tags, in as few calls as MLflow takes them, under names that it takes."""
    from mlflow.entities import RunTag

    valid = [RunTag(key(name), value) for name, value in tags.items()]
    for start in range(0, len(valid), PARAMS_AT_ONCE):
        client().log_batch(run_id, tags=valid[start : start + PARAMS_AT_ONCE])


def log_params(run_id: str, params: Mapping[str, Any]) -> None:
    """Log any number of parameters, in as few calls as MLflow takes them, under names that it takes."""
    from mlflow.entities import Param

    valid = [Param(key(name), str(value)) for name, value in params.items()]
    for start in range(0, len(valid), PARAMS_AT_ONCE):
        client().log_batch(run_id, params=valid[start : start + PARAMS_AT_ONCE])


def artifact_folder(run_id: str) -> str:
    """Where a run's artifacts lie, if that is a folder of this machine; otherwise empty."""
    place = urlparse(client().get_run(run_id).info.artifact_uri)
    return url2pathname(place.path) if place.scheme == "file" else ""


def log_file(run_id: str, content: bytes, name: str, folder: str = "") -> None:
    """Put a file into a run's artifacts, replacing one of that name; `name` may have folders.

    Args:
        folder: what `artifact_folder` gave, if that is known: MLflow is not needed then, nor the seconds of importing
            it.
    """
    if folder:
        write_atomically(Path(folder) / name, lambda stream: stream.write(content))
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / Path(name).name
        path.write_bytes(content)
        inside = str(Path(name).parent)
        client().log_artifact(run_id, str(path), None if inside == "." else inside)


def end_open_runs(experiment: str, parent: str, status: str = "FAILED") -> None:
    """Close a notebook's run and the runs under it that a dead process left running."""
    number = experiment_id(experiment)
    for run in every_run(client(), [number], f"tags.`{NOTEBOOK}` = '{parent}'"):
        if run.info.status == "RUNNING":
            client().set_terminated(run.info.run_id, status)
    client().set_terminated(parent, status)
