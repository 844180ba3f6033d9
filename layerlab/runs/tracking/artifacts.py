"""The files that a run keeps in MLflow, brought into a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layerlab.runs.tracking.store import reader


def download(run_id: str, folder: Path) -> None:
    """Put a run's artifacts into a folder."""
    reader().download_artifacts(run_id, "", str(folder))


def download_some(run_id: str, names: Iterable[str], folder: Path) -> None:
    """Put those of a run's artifacts into a folder that it has.

    Args:
        run_id: of the run.
        names: paths among the artifacts, such as `tables/pays.csv`.
        folder: an existing one.
    """
    names = list(names)
    parents = {name.rpartition("/")[0] for name in names}
    there = {item.path for parent in parents for item in reader().list_artifacts(run_id, parent)}
    for name in names:
        if name in there:
            reader().download_artifacts(run_id, name, str(folder))
