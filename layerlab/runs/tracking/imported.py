"""What an import brings in and leaves behind, and the runs that are here already."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from layerlab.runs.tracking import store
from layerlab.runs.tracking.pages import every_run

# Tag of a run that came as a claims.json: whatever its times, it lacks what its database holds.
CLAIMS_ALONE = f"{store.PREFIX}claims-alone"


@dataclass
class Imported:
    """What an import met.

    Attributes:
        new: runs that are new or have got further.
        known: runs that were here already.
        files: artifacts of new runs.
        nested: new runs that belong to another one that is here, too.
        lost: what was left behind although it belongs to the runs, in words with the reason → how often.
        ignored: the same of what is not brought in by design.
    """

    new: int = 0
    known: int = 0
    files: int = 0
    nested: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)


def origins(experiment: str) -> dict[str, Any]:
    """The runs of an experiment by their ids, and by the ids that they had elsewhere."""
    found = {}
    for run in every_run(store.client(), [experiment]):
        found[run.info.run_id] = found[run.data.tags.get(store.ORIGIN, run.info.run_id)] = run
    return found
