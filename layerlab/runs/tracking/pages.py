"""All of what MLflow gives a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Runs that are asked for at once.
PAGE = 5000


def every_run(there: Any, experiments: Sequence[str], wanted: str = "", **options: Any) -> list[Any]:
    """The runs of experiments that a filter takes, all of them.

    Args:
        there: the client.
        experiments: their ids.
        wanted: the filter, as MLflow's `search_runs` has it.
        options: of that.
    """
    runs: list[Any] = []
    token = None
    while True:
        page = there.search_runs(experiments, wanted, max_results=PAGE, page_token=token, **options)
        runs += page
        token = page.token
        if not token:
            return runs
