"""Finished runs, read from MLflow's SQLite database itself, since importing MLflow takes seconds.

Whatever is not as this expects it (another database, another schema) is left to MLflow.
"""

from __future__ import annotations

import contextlib
import sqlite3
from types import SimpleNamespace
from typing import Any

from layerlab.runs.tracking.database import sqlite_file

_EXPERIMENT = "SELECT experiment_id FROM experiments WHERE name = ?"
# The order is that of MLflow's own search.
_RUNS = """
SELECT runs.run_uuid FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid
WHERE runs.experiment_id = ? AND runs.status = 'FINISHED' AND runs.lifecycle_stage = 'active'
AND tags.key = 'kind' AND tags.value = 'notebook'
ORDER BY runs.start_time DESC, runs.run_uuid
"""
_TAGS = "SELECT key, value FROM tags WHERE run_uuid = ?"


def experiment_number(uri: str, name: str) -> str | None:
    """The id of the experiment of that name; None where there is none, or only MLflow can tell.

    Args:
        uri: where runs are tracked.
        name: of the experiment.
    """
    try:
        with _opened(uri) as database:
            found = database.execute(_EXPERIMENT, [name]).fetchall()
    except sqlite3.Error:
        return None
    return str(found[0][0]) if len(found) == 1 else None


def finished_notebooks(uri: str, paper: str) -> list[Any] | None:
    """The finished runs of a paper's notebook, the newest first, with `info.run_id` and `data.tags` as MLflow's have
    them; None where only MLflow can tell.

    Args:
        uri: where runs are tracked.
        paper: name of the experiment.
    """
    try:
        with _opened(uri) as database:
            experiments = database.execute(_EXPERIMENT, [paper]).fetchall()
            if len(experiments) > 1:
                return None
            runs = [run for found in experiments for (run,) in database.execute(_RUNS, found)]
            tags = [dict(database.execute(_TAGS, [run])) for run in runs]
    except sqlite3.Error:
        return None
    return [SimpleNamespace(info=SimpleNamespace(run_id=run), data=SimpleNamespace(tags=own))
            for run, own in zip(runs, tags, strict=True)]


def _opened(uri: str) -> contextlib.closing[sqlite3.Connection]:
    """The database, to be read.

    Raises:
        sqlite3.Error: it is none of SQLite's, or is not there.
    """
    database = sqlite_file(uri)
    if database is None:
        raise sqlite3.Error(f"{uri} is no database of SQLite")
    return contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", 1.0, uri=True))
